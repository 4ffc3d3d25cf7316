"""The order of images and the noise put on them: a function of the seed, the phase and the step alone.

So a resumed run, or one on another number of processes, sees the same batches. Knows tensors, no models.
"""

from __future__ import annotations

import torch

from ..data import ImageClassificationData, to_model_range
from ..flow_matching import sample_sigmas
from ..seeds import generator_for
from .strategy import Batch, Phase


class PhaseBatches:
    """Batches of one phase's real images.

    Args:
        data: gives the images of the phase's classes, which are decoded once and kept as uint8.
        phase: whose batches.
        seed: of the run.
        timestep_density: of sigma, "uniform" or "logit_normal".
        random_flip: flip images left to right with probability 1/2.

    Raises:
        ValueError: the phase's classes have no images.
    """

    def __init__(
        self, data: ImageClassificationData, phase: Phase, *, seed: int, timestep_density: str, random_flip: bool
    ) -> None:
        per_class = [data.images(class_id) for class_id in phase.class_ids]
        self.images = torch.cat(per_class)
        self.class_ids = torch.tensor(phase.class_ids).repeat_interleave(torch.tensor([len(x) for x in per_class]))
        if not len(self.images):
            raise ValueError(f"The classes {phase.class_ids} of phase {phase.name!r} have no training images.")
        self.phase = phase
        self.seed = seed
        self.timestep_density = timestep_density
        self.random_flip = random_flip
        self._permutation: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    @property
    def batches_per_epoch(self) -> int:
        """Batches that it takes to see every image once, rounded up."""
        return -(-len(self.images) // self.phase.settings.batch_size)

    def batch(self, number: int, *, share: int = 0, num_shares: int = 1) -> Batch:
        """Batch `number` of the phase, or the share of it that one of several processes takes.

        Args:
            number: from 0.
            share: which share.
            num_shares: into how many the batch is split.

        Returns:
            [`Batch`] on the CPU.
        """
        size = self.phase.settings.batch_size
        indices = self._indices(number * size, size)
        generator = generator_for(self.seed, self.phase.name, "batch", number)
        sample = to_model_range(self.images[indices])
        if self.random_flip:
            flip = torch.rand(size, generator=generator) < 0.5
            sample[flip] = sample[flip].flip(-1)
        sigma = sample_sigmas(size, density=self.timestep_density, generator=generator)
        noise = torch.randn(sample.shape, generator=generator)
        mine = slice(share, None, num_shares)
        return Batch(sample[mine], self.class_ids[indices][mine], noise[mine], sigma[mine])

    def _indices(self, start: int, count: int) -> torch.Tensor:
        """Positions start .. start + count - 1 in an endless row of permutations."""
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
