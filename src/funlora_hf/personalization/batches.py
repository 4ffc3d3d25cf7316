"""Batches of concepts' pictures: latents from a cache, captions, noise and times.

As for classes, a batch depends only on the seed, the phase and its number: not on what was read before, nor on the number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..continual.batches import EndlessOrder
from ..continual.devices import on_device
from ..continual.learning import Phase
from ..utils.seeds import generator_for
from .concepts import Concept
from .pictures import load_images
from .prior import Prior


# Pictures that are decoded and encoded at once, which bounds the memory.
_AT_ONCE = 16


class ImageEncoder(Protocol):
    """A model with a VAE."""

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map uint8 `(n, 3, h, w)`, on the CPU, to mean and deviation of the latents, float32 `(n, c, h', w')`, on its device.

        Each image is encoded by itself, so that its latents do not depend on the others."""
        ...


class Draws(Protocol):
    """An objective that draws times and noise on the generator's device."""

    def times(self, n: int, generator: torch.Generator) -> torch.Tensor: ...
    def noise(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor: ...


@dataclass
class ConceptBatch:
    """One batch, or the share of it for one process: pictures of concepts, then those of their classes.

    Args:
        latents: `(batch, c, h, w)`, float32, scaled as the denoiser takes them.
        noise: of the same shape.
        times: `(batch,)`, as the denoiser takes them.
        captions: one for each picture.
        concept_ids: `(batch,)`, int64, on the CPU; a picture of a class has the id of the concept of this class.
        weights: `(batch,)`, float32, of the losses.
        number: number of the batch in its phase, from 0.
        total: pictures of the batch in all processes.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    captions: list[str]
    concept_ids: torch.Tensor
    weights: torch.Tensor
    number: int = 0
    total: int = 0


class InTurn:
    """One row of each of several groups in turn, those of a group in its own endless order. The groups' rows follow one another."""

    def __init__(self, groups: Sequence[EndlessOrder]) -> None:
        self._groups = groups
        self._firsts = [sum(group.total for group in groups[:number]) for number in range(len(groups))]

    def entries(self, start: int, count: int) -> torch.Tensor:
        """Return the entries start .. start + count - 1, int64 `(count,)`."""
        rows, turns = torch.empty(count, dtype=torch.int64), len(self._groups)
        for number, (first, group) in enumerate(zip(self._firsts, self._groups, strict=True)):
            offset = (number - start) % turns
            if mine := len(range(offset, count, turns)):
                rows[offset::turns] = first + group.entries((start + offset) // turns, mine)
        return rows


class ConceptBatches:
    """Batches of one phase. Its pictures are encoded once, here, in both flips; their latents are kept on the CPU.

    The sum of the weighted losses of all processes, divided by the phase's batch size, is DreamBooth's loss: the mean of the concepts'
    pictures, plus the mean of the classes' times `prior.loss_weight`.

    Args:
        model: encodes the pictures; the batches are on the device of its latents.
        concepts: by id; those of `phase.class_ids` are read.
        seed: of the run.
        objective: draws times and noise, from a generator on the CPU, so that they are the same for every device.
        random_flip: flip pictures left to right with probability 1/2.
        resolution: height and width to which pictures are resized and cropped.
        prior: pictures of the classes, which are further rows of each batch.
        replayed: id of an earlier concept -> pictures -> their captions. They take the place of pictures of the phase's concepts, so that
            each concept, old or new, has the same share of the rows.

    Raises:
        ValueError: a picture cannot be read, or a concept has no picture of its class.

    Source: arXiv 2208.12242, prior preservation [text].
    """

    def __init__(
        self,
        model: ImageEncoder,
        concepts: Mapping[int, Concept],
        phase: Phase,
        *,
        seed: int,
        objective: Draws,
        random_flip: bool,
        resolution: int,
        prior: Prior | None = None,
        replayed: Mapping[int, Mapping[Path, str]] | None = None,
    ) -> None:
        self.phase, self.seed, self.objective = phase, seed, objective
        size = phase.settings.batch_size
        rows = [(one, path, concepts[one].caption(path)) for one in phase.class_ids for path in concepts[one].images]
        self.num_images = len(rows)
        order: EndlessOrder | InTurn = EndlessOrder(len(rows), seed, phase.name, "order")
        if replayed:
            rows += [(one, *picture) for one, drawn in replayed.items() for picture in drawn.items()]
            totals = Counter(one for one, _, _ in rows)
            order = InTurn([EndlessOrder(total, seed, phase.name, "order", one) for one, total in totals.items()])
        # Of the concepts and of the classes: first row, order, rows in a batch, weight.
        self._parts = [(0, order, size, 1.0)]
        if prior is not None:
            if without := [concepts[one].name for one in phase.class_ids if not prior.images.get(one)]:
                raise ValueError(f"Concept {without[0]!r} has no pictures of its class, expected at least one.")
            first, count = len(rows), prior.batch_size or size
            rows += [(one, *picture) for one in phase.class_ids for picture in prior.images[one].items()]
            order = EndlessOrder(len(rows) - first, seed, phase.name, "class order")
            self._parts.append((first, order, count, prior.loss_weight * size / count))
        self._ids = torch.tensor([one for one, _, _ in rows])
        self._captions = [caption for _, _, caption in rows]
        paths, encoded = [path for _, path, _ in rows], []
        for start in range(0, len(paths), _AT_ONCE):
            images = load_images(paths[start : start + _AT_ONCE], size=resolution)
            flips = torch.stack([images, images.flip(-1)] if random_flip else [images], dim=1)
            found = model.encode_images(flips.flatten(0, 1))
            encoded.append([one.cpu().unflatten(0, flips.shape[:2]) for one in found])
        self.device = found[0].device
        # Rows, flips, channels, height, width.
        self._mean, self._std = (torch.cat(parts) for parts in zip(*encoded, strict=True))

    def batch(self, number: int, *, share: int = 0, num_shares: int = 1) -> ConceptBatch:
        """Return batch `number`, from 0, of the phase, or the share of it for one of several processes."""
        places: list[torch.Tensor] = []
        weights: list[float] = []
        mine: list[int] = []
        for first, order, count, weight in self._parts:
            mine += range(len(weights), len(weights) + count)[share::num_shares]
            places.append(first + order.entries(number * count, count))
            weights += [weight] * count
        rows, total, shape = torch.cat(places)[mine], len(weights), self._mean.shape[2:]
        # Flips, times, the VAE's noise, noise, in this order: results depend on it. Without flips, their draws are not used.
        generator = generator_for(self.seed, self.phase.name, "batch", number)
        flips = (torch.rand(total, generator=generator) < 0.5).long()[mine] % self._mean.shape[1]
        times = self.objective.times(total, generator)[mine]
        spread = torch.randn((total, *shape), generator=generator)[mine]
        noise = self.objective.noise((total, *shape), generator)[mine]
        return ConceptBatch(
            latents=on_device(self._mean[rows, flips] + self._std[rows, flips] * spread, self.device),
            noise=on_device(noise, self.device),
            times=on_device(times, self.device),
            captions=[self._captions[row] for row in rows.tolist()],
            concept_ids=self._ids[rows],
            weights=on_device(torch.tensor(weights)[mine], self.device),
            number=number,
            total=total,
        )
