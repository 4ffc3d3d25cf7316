"""The interface of strategies that learn classes, and what they are given."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..data.tasks import Task
from ..flow_matching import losses_at
from ..sampling.pipeline import FunLoraPipeline
from ..sampling.solvers import expected_evaluations
from .config import ContinualTrainingArguments, ModelArguments
from .devices import on_device
from .learning import LearningSetting, LearningStrategy, Phase, PhaseSettings, Trainable


__all__ = [
    "Batch",
    "Phase",
    "PhaseSettings",
    "Setting",
    "Strategy",
    "Trainable",
    "folder_bytes",
    "tensor_bytes",
    "velocity_losses",
]


@dataclass(frozen=True)
class Setting(LearningSetting):
    """What a strategy may know of a run of a class-conditional generator.

    Args:
        output_dir: the run's folder; a strategy writes its files below it.
        class_names: id -> name of every class of the run.
        tasks: all tasks, in order.
        training: steps, rates, seed.
        device: device on which modules are built.
        base_dir: folder of the base pipeline: one that exists, or that task 1 will write.
        base_source: name of the base as users load it (folder or repository), for the adapters' configs.
        has_base: the base exists already, so task 1 is not trained.
        model: the arguments of the base and the adapters.
        image_shape: channels and height, which is the width, of all images.
        num_images: class id -> number of its real training images; a class without images is missing or has 0.
    """

    training: ContinualTrainingArguments
    base_dir: Path
    base_source: str
    has_base: bool
    model: ModelArguments
    image_shape: tuple[int, int]
    num_images: Mapping[int, int] = field(default_factory=dict)


@dataclass
class Batch:
    """One batch, on the device except for the classes, which are read as numbers.

    Args:
        sample: real images, `(batch, channels, height, width)`, float32 in [-1, 1].
        class_ids: `(batch,)`, int64, on the CPU.
        noise: standard normal, same shape as `sample`.
        sigma: `(batch,)`, float32 in [0, 1].
        number: number of the batch in its phase, from 0; a strategy must distinguish batches only by this.
        drawn: which samples a generator has drawn, `(batch,)`, bool, on the CPU; None: all are real.
        target: velocity to learn, same shape as `sample`; None: `velocity_target`.
    """

    sample: torch.Tensor
    class_ids: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    number: int = 0
    drawn: torch.Tensor | None = None
    target: torch.Tensor | None = None

    def reordered(self, order: torch.Tensor) -> Batch:
        """Return the same samples in another order, `(batch,)`, int64, on the CPU."""
        moved = on_device(order, self.sample.device)
        on_the_device = {name: getattr(self, name)[moved] for name in ("sample", "noise", "sigma")}
        drawn = None if self.drawn is None else self.drawn[order]
        target = None if self.target is None else self.target[moved]
        return replace(self, class_ids=self.class_ids[order], drawn=drawn, target=target, **on_the_device)


class Strategy(LearningStrategy):
    """How to learn one task of classes after another."""

    trains_own_base: ClassVar[bool] = False
    """True: task 1 trains another base than that of other strategies, so the run cannot start from a given one."""
    has_frozen_base: ClassVar[bool] = False
    """True: the base never changes after task 1, nor a class after its own task; both are checked at the end."""
    outside_data: ClassVar[bool] = False
    """True: its options name a generator that has learned from other data, so that a run has no `unet_config` and no `base_model`;
    results.json and tables say so."""
    has_held_out_loss: ClassVar[bool] = True
    """False: the generator gives no velocities, so there is no flow-matching loss to compare with that of other strategies."""
    prefix: ClassVar[str] = "adapter"
    """Whether a task uses learning rate, warm-up and moving average of the "base" or of an "adapter"."""
    setting: Setting

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @classmethod
    def image_shape(cls, model: ModelArguments, options: Any) -> tuple[int, int]:
        """Return channels and height of the images of a run without a given base; `options` are an `options_class`."""
        return model.unet.get("in_channels", 3), model.unet["sample_size"]

    def evaluations_per_image(self, solver: str, num_inference_steps: int) -> int:
        """Count the evaluations of the U-Net that draw one image."""
        return expected_evaluations(solver, num_inference_steps)

    def replay_evaluations(self, task: Task) -> int:
        """Count the evaluations of the U-Net, each for one image, that draw the images of past classes for a task."""
        return 0

    @abstractmethod
    def inference(self, class_ids: Sequence[int]) -> AbstractContextManager[FunLoraPipeline]:
        """Return a context that gives a pipeline which samples these classes with the right weights."""

    def parameters_per_class(self) -> dict[str, int | None]:
        """Count the parameters stored for a class: "parameters_per_class" without, "parameters_per_class_with_vector" with the
        class vector; None if the strategy stores none."""
        return {"parameters_per_class": None, "parameters_per_class_with_vector": None}

    def own_classifier(self) -> nn.Module | None:
        """Return the classifier that the strategy has trained itself, to the logits of the classes seen, in order; None: it
        trains none."""
        return None


def velocity_losses(module: nn.Module, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
    """Compute the flow-matching loss of each sample, `(batch,)`.

    `module` is a U-Net; `labels` are rows of its class embedding, `(batch,)`, int64, on the CPU or the device.
    """
    labels = on_device(labels, batch.sample.device)
    return losses_at(module, batch.sample, batch.noise, batch.sigma, labels, batch.target)


def tensor_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a safetensors file, without its header."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def folder_bytes(folders: Iterable[Path]) -> int:
    """Return the bytes of the weight files below some folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors"))
