"""Features in which sets of images are compared."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..data.pixels import to_model_range


_FID_EXTRA = 'pip install "funlora-hf[fid]"'


class FeatureExtractor(nn.Module):
    """Maps images, uint8 `(N, C, H, W)` in 0..255, on its device, to features, float `(N, D)`."""

    name: str
    """Its name in results."""


class ClassifierFeatures(FeatureExtractor):
    """The input of a classifier's last layer: D is 256 for the small network and 512 for ResNet-18.

    Distances in these features tell which of two generators is nearer to the real images as this classifier sees them.
    They have no unit and cannot be compared with those of another classifier or with FID. [ours] The classifier, from
    `build_classifier`, is copied; `head` is its last layer, from features to logits.
    """

    name = "classifier"

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        linear = [name for name, module in classifier.named_modules() if isinstance(module, nn.Linear)]
        self.network = copy.deepcopy(classifier).eval()
        self.head = self.network.get_submodule(linear[-1])
        self.network.set_submodule(linear[-1], nn.Identity())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images, uint8 `(N, C, H, W)` with the C that the classifier was built for, to features, float32 `(N, D)`."""
        return self.network(to_model_range(images))


class InceptionFeatures(FeatureExtractor):
    """The 2048 features of Inception v3 in which FID is measured, by torch-fidelity (the extra `fid`).

    torch-fidelity resizes the images to 299x299 as the TensorFlow original does, and downloads the original's weights
    (91 MB) once, into the cache of `torch.hub`. Grey images are repeated as three channels.

    Raises:
        ImportError: torch-fidelity, or torchvision which it needs, is not installed.
        OSError: the weights are not in the cache and could not be downloaded.

    Source: Heusel et al. 2017, arXiv 1706.08500 [text].
    """

    name = "inception"

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                f"the features of Inception need torch-fidelity and torchvision ({error}); install them with: "
                f"{_FID_EXTRA}, or choose `image_quality` 'classifier'."
            ) from error
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
        except OSError as error:  # urllib's errors are OSErrors
            raise OSError(
                f"the weights of Inception, which the extra of {_FID_EXTRA} downloads on first use, are not "
                f"available: {error}. Connect to the network once, put the file that torch-fidelity asks for into "
                f"{torch.hub.get_dir()}/checkpoints, or choose `image_quality` 'classifier'."
            ) from error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images, uint8 `(N, 1 or 3, H, W)`, to features, float32 `(N, 2048)`."""
        return self.network(images.expand(-1, 3, -1, -1))[0]


@torch.no_grad()
def extract_features(extractor: FeatureExtractor, images: torch.Tensor, *, batch_size: int = 100) -> torch.Tensor:
    """Compute features, float `(N, D)`, on the device of the extractor's weights.

    The images are uint8 `(N, C, H, W)`, 0..255, N >= 1, on any device.
    """
    device = next((weight.device for weight in extractor.parameters()), "cpu")
    return torch.cat([extractor(batch.to(device)) for batch in images.split(batch_size)])
