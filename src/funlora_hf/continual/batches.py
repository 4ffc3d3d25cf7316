"""Batches of a phase. The order of the images and their noise depend only on the seed, the phase and the step.

So a resumed run, or a run on another number of processes, sees the same batches.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

import torch

from ..data.image_data import ImageClassificationData
from ..data.pixels import to_model_range
from ..flow_matching import expected_velocity, interpolate, sample_sigmas
from ..utils.seeds import derive_seed, generator_for
from .config import EXPECTED, ContinualTrainingArguments
from .devices import on_device
from .learning import Phase
from .strategy import Batch


# A GPU keeps all images of a phase if they take at most so many bytes: 50,000 of 32x32 pixels take 0.15 GB.
MOST_BYTES_ON_DEVICE = 2 * 1024**3


class EndlessOrder:
    """An endless sequence of permutations of `total` rows; the seed of each derives from `seed`, `keys` and its number."""

    def __init__(self, total: int, seed: int, *keys: str | int) -> None:
        self.total, self.seed, self.keys = total, seed, keys
        self._permutation: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def entries(self, start: int, count: int) -> torch.Tensor:
        """Return the entries start .. start + count - 1, int64 `(count,)`."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.total)
            if self._permutation[0] != epoch:
                generator = generator_for(self.seed, *self.keys, epoch)
                self._permutation = (epoch, torch.randperm(self.total, generator=generator))
            part = self._permutation[1][offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)


@dataclass(eq=False, repr=False)
class PhaseBatches:
    """Batches of one phase's real images.

    Args:
        data: gives the images of the phase's classes. They are decoded once and kept as uint8, on the device, or on the
            CPU if they take more than 2 GiB. The target "expected" also keeps them, and their mirror images with `random_flip`, as
            float32 on the device.
        timestep_density: density of sigma, as in `sample_sigmas`.
        random_flip: flip images left to right with probability 1/2.
        device: device of the batches. Noise for the CPU is drawn there after flips and sigma, noise for another device on
            that device; flips, sigma and order are the same everywhere.
        memory_format: memory format of images and noise.

    Raises:
        ValueError: a class of the phase has no image.
    """

    data: ImageClassificationData
    phase: Phase
    _: KW_ONLY
    seed: int
    timestep_density: str
    random_flip: bool
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - torch's devices do not change
    memory_format: torch.memory_format = torch.preserve_format

    def __post_init__(self) -> None:
        phase, data = self.phase, self.data
        per_class = [data.images(class_id) for class_id in phase.class_ids]
        empty = [class_id for class_id, images in zip(phase.class_ids, per_class, strict=True) if not len(images)]
        if empty:
            names = ", ".join(f"{class_id} ({data.class_names[class_id]})" for class_id in empty)
            raise ValueError(
                f"Class {names} of phase {phase.name!r} has no training image, expected at least one: add one, or leave the "
                "class out of the dataset."
            )
        images = torch.cat(per_class)
        self.images = images.to(self.device) if images.nbytes <= MOST_BYTES_ON_DEVICE else images
        self.class_ids = torch.tensor(phase.class_ids).repeat_interleave(torch.tensor([len(x) for x in per_class]))
        self._order = EndlessOrder(len(images), self.seed, phase.name, "order")

    @property
    def num_images(self) -> int:
        """The number of images of all classes of the phase."""
        return len(self.images)

    def batch(self, number: int, *, share: int = 0, num_shares: int = 1) -> Batch:
        """Return batch `number`, from 0, of the phase, or the share of it for one of several processes."""
        settings = self.phase.settings
        size, times = settings.images_per_batch, 2 if settings.pairs else 1
        indices = self._order.entries(number * size, size).repeat(times)
        mine = slice(share, None, num_shares)
        # On the CPU for every device; flips, sigma, noise in this order: results depend on it.
        generator = generator_for(self.seed, self.phase.name, "batch", number)
        flip = (torch.rand(size, generator=generator) < 0.5).repeat(times) if self.random_flip else None
        sigma = sample_sigmas(size, density=self.timestep_density, generator=generator).repeat(times)
        images = self.images[on_device(indices[mine], self.images.device)]
        sample = to_model_range(on_device(images, self.device))
        if flip is not None:
            # A mask as an index would wait until the device has counted its entries.
            sample = torch.where(on_device(flip[mine], self.device)[:, None, None, None], sample.flip(-1), sample)
        noise = self._noise((size, *sample.shape[1:]), number, generator)
        noise = (torch.cat([noise, -noise]) if settings.pairs else noise)[mine]
        batch = Batch(
            sample.to(memory_format=self.memory_format),
            self.class_ids[indices][mine],
            noise.to(memory_format=self.memory_format),
            on_device(sigma[mine], self.device),
            number,
        )
        return replace(batch, target=self._expected(batch)) if settings.target == EXPECTED else batch

    def _expected(self, batch: Batch) -> torch.Tensor:
        """Return the `expected_velocity` of each sample, over all images of its class."""
        # Without the checks of ranges, which would wait for the GPU.
        noisy = interpolate(batch.sample, batch.noise, batch.sigma, check_range=False)
        target = torch.empty_like(noisy)
        for class_id, images in self._candidates.items():
            rows = on_device((batch.class_ids == class_id).nonzero()[:, 0], self.device)
            target[rows] = expected_velocity(noisy[rows], batch.sigma[rows], images, check_range=False)
        return target

    @cached_property
    def _candidates(self) -> dict[int, torch.Tensor]:
        """The images of each class as samples, with their mirror images if samples are flipped."""
        candidates = {}
        for class_id in self.phase.class_ids:
            rows = on_device(self.class_ids == class_id, self.images.device)
            images = to_model_range(on_device(self.images[rows], self.device))
            candidates[class_id] = torch.cat([images, images.flip(-1)]) if self.random_flip else images
        return candidates

    def _noise(self, shape: tuple[int, ...], number: int, generator: torch.Generator) -> torch.Tensor:
        if self.device.type != "cpu":
            seed = derive_seed(self.seed, self.phase.name, "noise", number)
            generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)


@dataclass(eq=False, repr=False)
class RealImages:
    """Makes the batches of each phase of a run, for a trainer."""

    data: ImageClassificationData
    training: ContinualTrainingArguments
    device: torch.device
    _: KW_ONLY
    random_flip: bool = False

    def __call__(self, phase: Phase) -> PhaseBatches:
        return PhaseBatches(
            self.data,
            phase,
            seed=self.training.seed,
            timestep_density=self.training.timestep_density,
            random_flip=self.random_flip,
            device=self.device,
            memory_format=torch.channels_last if self.training.channels_last else torch.preserve_format,
        )
