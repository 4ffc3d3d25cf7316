"""The order of images and their noise depend on the seed, the phase and the step alone.

So a resumed run, or one on another number of processes, sees the same batches.
"""

from __future__ import annotations

import torch

from ..data.image_data import ImageClassificationData
from ..data.pixels import to_model_range
from ..flow_matching import sample_sigmas
from ..utils.seeds import derive_seed, generator_for
from .devices import on_device
from .strategy import Batch, Phase


# Images of a phase up to this many bytes are kept on a GPU as a whole: 50,000 of 32x32 pixels take 0.15 GB.
MOST_BYTES_ON_DEVICE = 2 * 1024**3


class PhaseBatches:
    """Batches of one phase's real images.

    Args:
        data: gives the images of the phase's classes, which are decoded once and kept as uint8: on the device, or on the
            CPU if they take more than 2 GiB.
        timestep_density: of sigma, "uniform" or "logit_normal".
        random_flip: flip images left to right with probability 1/2.
        device: where batches go. Noise for the CPU is drawn there after flips and sigma, noise for another device on that
            one; flips, sigma and order are the same everywhere.
        memory_format: of images and noise.

    Raises:
        ValueError: a class of the phase has no image.
    """

    def __init__(
        self,
        data: ImageClassificationData,
        phase: Phase,
        *,
        seed: int,
        timestep_density: str,
        random_flip: bool,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        per_class = [data.images(class_id) for class_id in phase.class_ids]
        empty = [class_id for class_id, images in zip(phase.class_ids, per_class, strict=True) if not len(images)]
        if empty:
            names = ", ".join(f"{class_id} ({data.class_names[class_id]})" for class_id in empty)
            raise ValueError(
                f"Class {names} of phase {phase.name!r} has no training image, expected at least one: add one, or leave the "
                "class out of the dataset."
            )
        images = torch.cat(per_class)
        self.device = torch.device(device)
        self.images = images.to(self.device) if images.nbytes <= MOST_BYTES_ON_DEVICE else images
        self.class_ids = torch.tensor(phase.class_ids).repeat_interleave(torch.tensor([len(x) for x in per_class]))
        self.phase = phase
        self.seed = seed
        self.timestep_density = timestep_density
        self.random_flip = random_flip
        self.memory_format = memory_format
        self._permutation: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def batch(self, number: int, *, share: int = 0, num_shares: int = 1) -> Batch:
        """Batch `number`, from 0, of the phase, or the share of it that one of several processes takes."""
        size = self.phase.settings.batch_size
        indices = self._indices(number * size, size)
        mine = slice(share, None, num_shares)
        # On the CPU for every device; flips, sigma, noise in this order: results depend on it.
        generator = generator_for(self.seed, self.phase.name, "batch", number)
        flip = torch.rand(size, generator=generator) < 0.5 if self.random_flip else None
        sigma = sample_sigmas(size, density=self.timestep_density, generator=generator)
        sample = self._images(indices[mine], None if flip is None else flip[mine])
        noise = self._noise((size, *sample.shape[1:]), number, generator)[mine]
        return Batch(
            sample.to(memory_format=self.memory_format),
            self.class_ids[indices][mine],
            noise.to(memory_format=self.memory_format),
            on_device(sigma[mine], self.device),
            number,
        )

    def _images(self, indices: torch.Tensor, flip: torch.Tensor | None) -> torch.Tensor:
        images = on_device(self.images[on_device(indices, self.images.device)], self.device)
        sample = to_model_range(images)
        if flip is None:
            return sample
        # A mask as an index would wait for the device to count its entries.
        return torch.where(on_device(flip, self.device)[:, None, None, None], sample.flip(-1), sample)

    def _noise(self, shape: tuple[int, ...], number: int, generator: torch.Generator) -> torch.Tensor:
        if self.device.type != "cpu":
            seed = derive_seed(self.seed, self.phase.name, "noise", number)
            generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    def _indices(self, start: int, count: int) -> torch.Tensor:
        """Entries start .. start + count - 1 of an endless sequence of permutations."""
        parts, total = [], len(self.images)
        while count > 0:
            epoch, offset = divmod(start, total)
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> torch.Tensor:
        if self._permutation[0] != epoch:
            generator = generator_for(self.seed, self.phase.name, "order", epoch)
            self._permutation = (epoch, torch.randperm(len(self.images), generator=generator))
        return self._permutation[1]
