"""Draw images of past classes from a generator, and keep them on disk while they are needed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from ...classifier import ARCHITECTURES
from ...data.pixels import to_model_range
from ...sampling.drawing import draw_samples, to_uint8
from ...sampling.guidance import Guidance
from ...sampling.pipeline import FunLoraPipeline
from ...sampling.solvers import SOLVERS
from ...utils.field_types import Count, Range, check_field_types, one_of
from ...utils.files import read_tensors, write_tensors
from ..devices import on_device
from ..strategy import Batch


@dataclass
class DrawingOptions:
    """
    Args:
        images_per_class: images generated of every past class before a task; None: as many as the class has real images.
        solver: of the sampling, as in the pipeline.
        num_inference_steps: as in the pipeline.
        sampling_batch_size: images at once.
    """

    images_per_class: Count | None = None
    solver: Annotated[str, one_of(*SOLVERS)] = "heun"
    num_inference_steps: Count = 10
    sampling_batch_size: Count = 250

    def __post_init__(self) -> None:
        check_field_types(self)


@dataclass
class ReplayedClassifierOptions(DrawingOptions):
    """
    Args:
        classifier_train_steps: steps of the classifier for each class seen.
        classifier_batch_size: its batch size.
        classifier_learning_rate: learning rate of Adam.
        classifier_architecture: "resnet18", "cnn" (small), or "auto": by the size of the images.

    The other options say how images are drawn.
    """

    classifier_train_steps: Count = 50
    classifier_batch_size: Count = 100
    classifier_learning_rate: Annotated[float, Range(0, 1, above=True)] = 1e-3
    classifier_architecture: Annotated[str, one_of(*ARCHITECTURES)] = "auto"


@dataclass
class ReplayOptions(ReplayedClassifierOptions):
    """
    Args:
        distillation: weight of the distance to the previous generator's velocity, which takes the place of the data's loss on
            generated images; 0: no distillation.

    The other options are those of the classifier.
    """

    distillation: Annotated[float, Range(0)] = 0.0


@dataclass(frozen=True)
class GeneratedImages:
    """Draws images by class and keeps them in a folder until `delete`; the next time they are read from there."""

    folder: Path
    options: DrawingOptions
    seed: int

    def draw(
        self, pipe: FunLoraPipeline, counts: Mapping[int, int], purpose: str, *, guidance: Guidance | None = None
    ) -> dict[int, torch.Tensor]:
        """Return images by class, uint8 `(n, channels, height, width)`, on the CPU; `counts` has their number by class id.

        They are the same for the same purpose, which is part of the seed and of the files' names.
        """
        options, images = self.options, {}
        for class_id, count in counts.items():
            path = self.folder / f"{purpose}_class_{class_id}.safetensors"
            if not path.is_file():
                samples = draw_samples(
                    pipe,
                    class_id,
                    count,
                    purpose=purpose,
                    seed=self.seed,
                    batch_size=options.sampling_batch_size,
                    solver=options.solver,
                    num_inference_steps=options.num_inference_steps,
                    guidance=guidance,
                )
                write_tensors(path, {"images": to_uint8(samples.images)})
            images[class_id] = read_tensors(path, remedy="delete it, and it is drawn again", keys=["images"])["images"]
        return images

    def delete(self) -> None:
        """Delete all images; several processes may do so at once."""
        shutil.rmtree(self.folder, ignore_errors=True)


def mix(real: Batch, generated: Mapping[int, torch.Tensor], num_new: int = 0, *, share: float | None = None) -> Batch:
    """Return a batch in which the shares of past and new classes are in proportion to their number, or as given.

    Images of past classes are generated, drawn uniformly over the classes and over the images of each; those of new classes are
    the real images of `real`.

    Draws from torch's global generator of the CPU.

    Args:
        real: a batch of new classes.
        generated: class id -> images of a past class, uint8, at least one each; without any, `real` is returned.
        num_new: how many classes are new.
        share: of generated images; None: that of past classes among all.

    Source: Shin et al. 2017 (arXiv 1705.08690), as the ratio of importance 1 / tasks there [text]; by classes [ours].
    """
    if not generated:
        return real
    past = list(generated)
    size = len(real.class_ids)
    replaced = torch.rand(size) < (len(past) / (len(past) + num_new) if share is None else share)
    chosen = torch.randint(len(past), (size,)).tolist()
    positions = torch.rand(size).tolist()
    images = [generated[past[row]] for row in chosen]
    replay = torch.stack([image[int(at * len(image))] for image, at in zip(images, positions, strict=True)])
    mask = on_device(replaced, real.sample.device)[:, None, None, None]
    sample = torch.where(mask, on_device(to_model_range(replay), real.sample.device), real.sample)
    labels = torch.where(replaced, torch.tensor([past[row] for row in chosen]), real.class_ids)
    return replace(real, sample=sample, class_ids=labels, drawn=replaced)


def share_of(counts: Mapping[int, int], part: int, num_parts: int) -> dict[int, int]:
    """Return how many images of each class belong to a part: at least one, and in all parts together at least the counts."""
    return {
        class_id: max(1, -(-count * (part + 1) // num_parts) + (-count * part // num_parts))
        for class_id, count in counts.items()
    }


def joined(parts: Sequence[Mapping[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """Join the images by class of several draws of the same classes."""
    return {class_id: torch.cat([part[class_id] for part in parts]) for class_id in (parts[0] if parts else {})}
