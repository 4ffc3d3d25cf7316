"""The judge of the tiny base: a small network that reads from a picture what it shows.

It was trained on renderings, the concepts' among them, which no strategy sees.

Source: [ours].
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...utils.files import read_tensors
from . import scenes
from .fitting import fit
from .scenes import Scene


# By attribute, the names of its values: 0 stands for the first. A scene that lacks the attribute has -1.
VALUES: Mapping[str, tuple[str, ...]] = {
    "noun": scenes.NOUNS,
    "colour": tuple(scenes.COLOURS),
    "background": tuple(scenes.BACKGROUNDS),
    "size": scenes.SIZES,
    "sign": scenes.SHAPES,
    "second_shape": scenes.SHAPES,
    "second_colour": tuple(scenes.COLOURS),
}
FILE = Path(__file__).parent / "files" / "reader.safetensors"
_WIDTH = 64


def attributes_of(scene: Scene) -> dict[str, int]:
    """Return the index in `VALUES` of each attribute; -1 for an attribute that the scene lacks."""
    told = {name: getattr(scene, name) for name in VALUES}
    return {name: VALUES[name].index(value) if value else -1 for name, value in told.items()}


def as_tensor(drawn: Iterable[Scene]) -> torch.Tensor:
    """Render scenes into uint8 (n, 3, 32, 32)."""
    arrays = np.stack([np.asarray(scenes.render(scene)) for scene in drawn])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


class Reader(nn.Module):
    """Read attributes from images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(_block(3, 32), _block(32, 64, stride=2), _block(64, 64), _block(64, 64, stride=2), _block(64, 64)),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, _WIDTH),
        )
        self.heads = nn.Linear(_WIDTH, sum(map(len, VALUES.values())))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the heads read, (n, 64) float32.

        Args:
            images: (n, 3, 32, 32) uint8.
        """
        return self.body(images.float() / 127.5 - 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return by attribute the logits of its values, (n, number of values)."""
        logits = self.heads(torch.relu(self.features(images)))
        return dict(zip(VALUES, logits.split([len(values) for values in VALUES.values()], 1), strict=True))


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.ReLU())


def train_reader(*, steps: int, seed: int, batch: int = 64) -> Reader:
    """Train a reader on fresh renderings, half of them blurred, noisy, or of another colour."""
    rng = random.Random(seed)
    reader = Reader()

    def loss() -> torch.Tensor:
        drawn = [scenes.random_scene(rng, composites=0.6, concepts=True) for _ in range(batch)]
        logits = reader(_changed(as_tensor(drawn)))
        told = [attributes_of(scene) for scene in drawn]
        truth = {name: torch.tensor([one[name] for one in told]) for name in VALUES}
        return sum(
            (nn.functional.cross_entropy(logits[name], truth[name], ignore_index=-1) for name in VALUES),
            start=torch.zeros(()),
        )

    fit("reader", reader.parameters(), loss, steps=steps, learning_rate=3e-3, ema_decay=0.99)
    return reader.eval().requires_grad_(False)


def _changed(images: torch.Tensor) -> torch.Tensor:
    """Change every second image a little, as a decoder may."""
    half = images[::2].float()
    blurred = nn.functional.avg_pool2d(nn.functional.pad(half, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(half), 1, 1, 1)
    half = half.lerp(blurred, share) + 12 * torch.rand(len(half), 1, 1, 1) * torch.randn_like(half)
    half = half + 15 * torch.randn(len(half), 3, 1, 1)
    changed = images.clone()
    changed[::2] = half.clamp(0, 255).to(torch.uint8)
    return changed


@cache
def load_reader(file: Path = FILE) -> Reader:
    """Return a reader in evaluation mode, float32, on the CPU; by default the package's."""
    reader = Reader().eval().requires_grad_(False)
    tensors = read_tensors(file, remedy="install the package again, or run `make tiny-base`")
    reader.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return reader


@torch.no_grad()
def read(images: torch.Tensor, reader: Reader | None = None) -> dict[str, torch.Tensor]:
    """Read what images show.

    Args:
        images: (n, 3, 32, 32) uint8.
        reader: None: the package's.

    Returns:
        By attribute of `VALUES`, indices (n,) int64. An attribute is read even where the scene may lack it: compare
        those that `attributes_of` does not give as -1.
    """
    check_images(images)
    reader = reader or load_reader()
    parts = [reader(part) for part in images.cpu().split(256)]
    return {name: torch.cat([part[name].argmax(1) for part in parts]) for name in VALUES}


@torch.no_grad()
def features(images: torch.Tensor) -> torch.Tensor:
    """Return the reader's features of images (n, 3, 32, 32) uint8, for similarity by cosine: (n, 64) float32."""
    check_images(images)
    return torch.cat([load_reader().features(part) for part in images.cpu().split(256)])


def check_images(images: torch.Tensor) -> None:
    size = (3, scenes.RESOLUTION, scenes.RESOLUTION)
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != size or not len(images):
        raise ValueError(
            f"images: expected uint8 (n, 3, {size[1]}, {size[2]}) with n > 0, got {images.dtype} {tuple(images.shape)}; "
            "the reader knows pictures of the tiny base only"
        )


def shares_right(images: torch.Tensor, drawn: Sequence[Scene], reader: Reader | None = None) -> dict[str, float]:
    """Return by attribute the share of images read right, in [0, 1], of those that have it.

    Args:
        images: (n, 3, 32, 32) uint8, of the n scenes `drawn`.
        reader: None: the package's.
    """
    found = read(images, reader)
    shares = {}
    for name in VALUES:
        truth = torch.tensor([attributes_of(scene)[name] for scene in drawn])
        if (has := truth >= 0).any():
            shares[name] = (found[name] == truth)[has].float().mean().item()
    return shares
