"""Scores of samples of concepts: by CLIP, by DINO, and over time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPImageProcessor, CLIPModel

from ..evaluation.features import FeatureExtractor
from ..utils.checks import check_not_mistyped
from ..utils.quiet import quiet_loading


# Source: CLIPScore, arXiv 2104.08718 [text]: w.
CLIP_SCORE_WEIGHT = 2.5
# Source: the evaluation of DINO, arXiv 2104.14294 [text]. The processor that is published with it squeezes to 224 x 224 instead.
_DINO_SIZE: dict[str, Any] = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
}  # 3: bicubic

# Types of transformers in which the class token comes first.
_DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
_SOURCE: dict[str, Any] = {"revision": "main", "trust_remote_code": False}


class ClipFeatures(FeatureExtractor):
    """Features of images and texts in the space that they share in CLIP.

    Images, uint8 `(n, 3, h, w)`, become float32 `(n, d)`, prepared by the model's own processor.

    Args:
        name: folder or repository of a `CLIPModel`, in safetensors.
        device: where the model is.

    Raises:
        OSError: there is no such model, or not in safetensors.
        ValueError: it is of another type, or lacks weights.
    """

    name = "clip"

    def __init__(self, name: str, *, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.model, self.processor = _load(CLIPModel, name, ("clip",))
        self.model.to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name, **_SOURCE)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images to features."""
        return _tensor(self.model.get_image_features(pixel_values=_pixels(self.processor, images)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Map texts to features, float32 `(n, d)`.

        Raises:
            ValueError: a text is longer than the model's limit.
        """
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        most = self.model.config.text_config.max_position_embeddings
        if tokens.input_ids.shape[1] > most:
            longest = max(texts, key=lambda text: len(self.tokenizer(text).input_ids))
            raise ValueError(f"The text {longest!r} has more than the {most} tokens that CLIP reads: shorten it.")
        return _tensor(self.model.get_text_features(**tokens.to(self.model.device)))


class DinoFeatures(FeatureExtractor):
    """The class token of DINO, or of another vision transformer that has one first.

    Images, uint8 `(n, 3, h, w)`, become float32 `(n, d)`: their shorter side is resized to 256, bicubic, and the centre of 224 x 224 kept.
    Arguments and errors are those of [`ClipFeatures`]; the model is a `ViTModel` or a `Dinov2Model`.
    """

    name = "dino"

    def __init__(self, name: str, *, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.model, own = _load(AutoModel, name, _DINO_TYPES)
        self.model.to(device)
        self.processor = CLIPImageProcessor(**_DINO_SIZE, image_mean=own.image_mean, image_std=own.image_std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images to features."""
        return self.model(pixel_values=_pixels(self.processor, images)).last_hidden_state[:, 0]


def image_similarity(samples: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Compute CLIP-I or DINO of each sample, `(n,)` in [-1, 1]: the mean of its cosines to all references.

    Args:
        samples: features `(n, d)`.
        references: features `(m, d)`, m >= 1.

    Source: arXiv 2208.12242, subject fidelity [text].
    """
    return (normalize(samples.double()) @ normalize(references.double()).T).mean(dim=1)


def text_similarity(samples: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Compute CLIP-T of each sample, `(n,)` in [-1, 1]: its cosine to its own prompt; features `(n, d)` both.

    Source: arXiv 2208.12242, prompt fidelity [text].
    """
    return (normalize(samples.double()) * normalize(texts.double())).sum(dim=1)


def clip_score(cosines: torch.Tensor) -> torch.Tensor:
    """Compute CLIPScore, in [0, 2.5], of the cosines that `text_similarity` returns.

    Source: arXiv 2104.08718 [text]; papers of personalization print either of the two.
    """
    return CLIP_SCORE_WEIGHT * cosines.clamp(min=0)


def mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    """Return the mean of scores of images `(n,)`, and its standard error, None for a single image."""
    found = values.double().tolist()
    return fmean(found), stdev(found) / len(found) ** 0.5 if len(found) > 1 else None


def scores_over_time(matrix: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Compute what a score of concepts says of learning and forgetting.

    Args:
        matrix: `M[t][i]`, the score of concept i after task t; row t has the concepts learned until then.

    Returns:
        "matrix"; "own" and "end": the mean score of all concepts after their own task, and after the last; "forgetting": the mean of
        `max_{t >= i} M[t][i] - M[T][i]`, never negative, and "drop": the mean of own - end, signed and hence unbiased, both over the
        concepts before the last task, 0 if there are none.

    Source: Chaudhry et al. 2018, arXiv 1801.10112 [text]; the maximum over all rows, and "drop", are [ours].
    """
    last = matrix[-1]
    columns = [[row[concept] for row in matrix if len(row) > concept] for concept in range(len(last))]
    earlier = [column for column in columns if len(column) > 1]
    return {
        "matrix": [list(row) for row in matrix],
        "own": fmean(column[0] for column in columns),
        "end": fmean(last),
        "forgetting": fmean(max(column) - column[-1] for column in earlier) if earlier else 0.0,
        "drop": fmean(column[0] - column[-1] for column in earlier) if earlier else 0.0,
    }


def _load(kind: Any, name: str, types: tuple[str, ...]) -> tuple[Any, Any]:
    """Load a model, all of whose weights come from the file, and its processor of images."""
    check_not_mistyped("name", name)
    found = AutoConfig.from_pretrained(name, **_SOURCE).model_type
    if found not in types:
        raise ValueError(f"{name!r} is a model of type {found!r}, expected one of {', '.join(types)}.")
    # DINO's files have no pooler.
    options = {"add_pooling_layer": False} if found == "vit" else {}
    with quiet_loading():
        model, info = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True, **_SOURCE, **options)
        processor = AutoImageProcessor.from_pretrained(name, **_SOURCE)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name!r} has no weights for {missing[0]!r} and {len(missing) - 1} more: it is damaged.")
    return model.eval().float(), processor


def _pixels(processor: Any, images: torch.Tensor) -> torch.Tensor:
    found = processor(images=list(images.cpu()), return_tensors="pt").pixel_values
    return found.to(images.device)


def _tensor(output: Any) -> torch.Tensor:
    """From transformers 5 on, features come in an output object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
