"""Train a classifier of images and measure its accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from .data.pixels import to_model_range
from .tuner_base.wrappers import evaluation_mode
from .utils.field_types import Count, Positive, Range, check_field_types, one_of
from .utils.progress import Progress


ARCHITECTURES = ("auto", "resnet18", "cnn")
# "auto" chooses the small network for images smaller than this: ResNet-18 would shrink 8x8 digits to a single pixel, and at 28x28 a
# step takes a CPU seconds.
SMALLEST_RESNET_IMAGE = 32
# ResNet-18 keeps its ImageNet stem, which divides the resolution by four, for images of this size and larger.
SMALLEST_STANDARD_STEM_IMAGE = 128
# Of SGD, both constant [ours].
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

BatchSize = Annotated[int, Range(2, why="batch normalization needs two images")]
CropPadding = Annotated[int, Range(0, why="0 switches the random crop off")]


@dataclass
class ClassifierConfig:
    """How a classifier is trained. The defaults are the paper's recipe for 32x32 and 64x64 colour images.

    A run's defaults, for 8x8 grey digits, are 20 epochs and neither crop nor flip [ours].

    Attributes:
        epochs: passes over the images [text: 30].
        batch_size: images per optimiser step, at least 2 because of batch normalisation [text: 100].
        learning_rate: the peak of the one-cycle schedule [ours: the paper's is not given].
        crop_padding: pixels of black border added on every side before a random crop of the original size; 0 switches
            the random crop off [text: random crop; ours: 4, the usual value for CIFAR].
        horizontal_flip: whether to mirror each image with probability 1/2 [text]. Switch it off where a mirrored
            image may belong to another class, as with digits.
        max_train_steps: upper limit of optimizer steps, None for none. The schedule is shortened to fit, so a
            limited run still ends at a small learning rate.
        architecture: "resnet18", "cnn", or "auto", which chooses "cnn" for images smaller than 32 pixels and
            "resnet18" otherwise.

    Raises:
        ValueError: a field is out of its range; the message names the field, the value and what was expected.

    Source: arXiv 2510.02631, implementation details: ResNet-18, 30 epochs, batch 100, SGD with a one-cycle schedule,
        random crop and horizontal flip [text]; everything marked above as ours [ours].
    """

    epochs: Count = 30
    batch_size: BatchSize = 100
    learning_rate: Positive = 0.1
    crop_padding: CropPadding = 4
    horizontal_flip: bool = True
    max_train_steps: Count | None = None
    architecture: Annotated[str, one_of(*ARCHITECTURES)] = "auto"

    def __post_init__(self) -> None:
        check_field_types(self)


def build_classifier(num_classes: int, *, channels: int, image_size: int, architecture: str = "auto") -> nn.Module:
    """Build an untrained classifier. Its weights are drawn from torch's global random state, as for any module.

    Args:
        num_classes: number of logits.
        channels: channels of the images, 1 or 3 in practice.
        image_size: height and width of the images, in pixels. The network and its stem depend on it; the network
            itself accepts other sizes.
        architecture: "auto", "resnet18" or "cnn", see `ClassifierConfig`.

    Returns:
        A module from images, float (N, C, H, W) in [-1, 1], to logits, float (N, num_classes).

    Source: ResNet-18, arXiv 2510.02631, implementation details [text]; its stem for small images (3x3 convolution of
        stride 1, no pooling) and the small network are [ours].
    """
    if architecture == "auto":
        architecture = "cnn" if image_size < SMALLEST_RESNET_IMAGE else "resnet18"
    if architecture == "cnn":
        return _small_cnn(num_classes, channels=channels)
    return _ResNet18(num_classes, channels=channels, small_stem=image_size < SMALLEST_STANDARD_STEM_IMAGE)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    config: ClassifierConfig,
    seed: int,
    device: str | torch.device = "cpu",
    description: str = "classifier",
) -> nn.Module:
    """Train a new classifier with cross-entropy; return it on `device`, in evaluation mode (see `build_classifier`).

    The initial weights, the order of the images and the augmentation depend only on `seed`; the global random
    states are neither read nor changed. On the CPU, with the same number of threads, equal seeds give the same bits.

    Args:
        images: uint8 (N, C, H, W) with H = W, N >= 1, range 0..255, on any device. They are moved to `device` batch by batch.
        labels: int64 (N,), range 0..num_classes - 1.
        num_classes: number of logits; classes without an image are allowed.
        config: the recipe.
        seed: non-negative integer below 2**63.
        device: where to train.
        description: text in front of the progress bar.

    Raises:
        RuntimeError: the loss is not finite; the message names the phase "classifier" and the step.

    Source: recipe, arXiv 2510.02631, implementation details [text], see `ClassifierConfig`.
    """
    if len(images) == 1:
        # Batch normalization cannot train on one image: use it twice, each copy with its own augmentation.
        images, labels = images.repeat(2, 1, 1, 1), labels.repeat(2)
    labels = labels.to(images.device)

    # devices=[] and the default generator: torch.manual_seed would also reseed every accelerator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = build_classifier(
            num_classes, channels=images.shape[1], image_size=images.shape[2], architecture=config.architecture
        )
    classifier.to(device).train()
    generator = torch.Generator().manual_seed(seed)

    steps_per_epoch, total_steps = training_steps(len(images), config)
    rate = config.learning_rate
    optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    scheduler = None
    # A single step has no cycle: OneCycleLR would give it the final rate, which is almost zero.
    if total_steps > 1:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps, cycle_momentum=False)

    with Progress(total_steps, description) as bar:
        for step in range(total_steps):
            position = step % steps_per_epoch
            if position == 0:
                order = torch.randperm(len(images), generator=generator)
            chosen = order[position * config.batch_size : (position + 1) * config.batch_size].to(images.device)
            batch = _augment(images[chosen], config=config, generator=generator)
            logits = classifier(to_model_range(batch.to(device)))
            loss = functional.cross_entropy(logits, labels[chosen].to(device))
            if not torch.isfinite(loss):
                raise RuntimeError(
                    f"phase classifier: the loss is {loss.item()} at step {step} of {total_steps}; "
                    f"lower ClassifierConfig.learning_rate (now {config.learning_rate})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            # OneCycleLR has total_steps values, the first is set at construction: after the last step there is none left.
            if scheduler is not None and step + 1 < total_steps:
                scheduler.step()
            bar.update()
    return classifier.eval()


def training_steps(num_images: int, config: ClassifierConfig) -> tuple[int, int]:
    """Return the steps of an epoch and those of the whole training, for at least one image."""
    full_batches, rest = divmod(max(2, num_images), config.batch_size)
    # Batch normalization cannot train on a last batch of one image: it is left out, a different image in each epoch.
    steps_per_epoch = full_batches + (1 if rest >= 2 else 0)
    limit = config.max_train_steps
    total = config.epochs * steps_per_epoch
    return steps_per_epoch, total if limit is None else min(total, limit)


@torch.no_grad()
def predict(classifier: nn.Module, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """Predict the class of every image, an index of the logits, int64 (N,) on the CPU; computed where the classifier is.

    Args:
        classifier: as from `build_classifier`; it runs in evaluation mode and is then left in the mode it had.
        images: uint8 (N, C, H, W), N >= 1, range 0..255.
        batch_size: images per forward pass.
    """
    device = next((weight.device for weight in classifier.parameters()), "cpu")
    with evaluation_mode(classifier):
        logits = (classifier(to_model_range(batch.to(device))) for batch in images.split(batch_size))
        return torch.cat([part.argmax(dim=1).cpu() for part in logits])


def percentage(correct: Tensor) -> float:
    """Return the share of true entries in a boolean tensor `(N,)`, N >= 1, in %, range [0, 100]."""
    return 100.0 * int(correct.sum()) / len(correct)


class _ResNet18(nn.Module):
    """ResNet-18 of transformers, returning logits; `small_stem` keeps the full resolution, as usual for CIFAR."""

    def __init__(self, num_classes: int, *, channels: int, small_stem: bool) -> None:
        super().__init__()
        config = ResNetConfig(
            num_channels=channels,
            embedding_size=64,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            downsample_in_first_stage=False,
        )
        config.num_labels = num_classes
        self.model = ResNetForImageClassification(config)
        if small_stem:
            stem = self.model.resnet.embedder
            convolution = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
            # As transformers initializes the convolution that this one replaces.
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            stem.embedder.convolution = convolution
            stem.add_module("pooler", nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        """Map images, float (N, C, H, W) in [-1, 1], to logits, float (N, num_classes)."""
        return self.model(pixel_values=images).logits


def _small_cnn(num_classes: int, *, channels: int) -> nn.Sequential:
    """Three convolutions, for images of about 8x8 pixels; with adaptive pooling, any size works."""
    return nn.Sequential(
        *_convolution(channels, 16),
        *_convolution(16, 32),
        nn.MaxPool2d(kernel_size=2),
        *_convolution(32, 64),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, num_classes),
    )


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    # The normalization would cancel a bias.
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()


def _augment(batch: Tensor, *, config: ClassifierConfig, generator: torch.Generator) -> Tensor:
    """Crop and mirror each image of a batch, uint8 (N, C, H, W), at random; a CPU generator gives equal draws on all devices.

    Source: arXiv 2510.02631, implementation details [text: random crop and horizontal flip].
    """
    count, _, height, width = batch.shape
    if config.crop_padding > 0:
        pad = config.crop_padding
        rows, columns = torch.randint(0, 2 * pad + 1, (2, count), generator=generator).to(batch.device)
        # Every window of each padded image, as views: (N, C, 2 pad + 1, 2 pad + 1, H, W).
        windows = functional.pad(batch, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
        batch = windows[torch.arange(count, device=batch.device), :, rows, columns]
    if config.horizontal_flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(batch.device)
        batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
    return batch
