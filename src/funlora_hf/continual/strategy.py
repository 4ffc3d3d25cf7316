"""The interface that every continual strategy implements, and what it is given.

A task may have several phases; the strategy names them, the trainer runs them. The trainer is responsible for optimizer,
backward pass, moving average, seeds, devices, checkpoints and progress; the strategy decides what is trained, on which batch,
with which loss, and what is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..data.tasks import Task
from ..flow_matching import losses_at
from ..sampling.pipeline import FunLoraPipeline
from ..utils.field_types import check_field_types
from .config import ContinualTrainingArguments, ModelArguments, parse_options
from .devices import on_device


@dataclass(frozen=True)
class Setting:
    """What a strategy may know of a run.

    Args:
        output_dir: the run's folder; a strategy writes its files below it.
        base_dir: folder of the base pipeline: one that exists, or that task 1 will write.
        base_source: name of the base as users load it (folder or repository), for the adapters' configs.
        has_base: the base exists already, so task 1 is not trained.
        class_names: id -> name of every class of the run.
        tasks: all tasks, in order.
        model: the arguments of the base and the adapters.
        training: steps, rates, seed.
        device: device on which modules are built.
        num_images: class id -> number of its real training images; a class without images is missing or has 0.
    """

    output_dir: Path
    base_dir: Path
    base_source: str
    has_base: bool
    class_names: Mapping[int, str]
    tasks: Sequence[Task]
    model: ModelArguments
    training: ContinualTrainingArguments
    device: torch.device
    num_images: Mapping[int, int] = field(default_factory=dict)

    def seen(self, task: Task) -> tuple[int, ...]:
        """Return the ids of all classes up to and including a task, in order."""
        return tuple(class_id for known in self.tasks[: task.index + 1] for class_id in known.class_ids)


@dataclass(frozen=True)
class PhaseSettings:
    """Optimization settings of one phase.

    Args:
        train_steps: optimizer steps, or None if `epochs` counts.
        epochs: passes over the phase's images, or None if `train_steps` counts.
        batch_size: images in a batch, over all processes.
        learning_rate: learning rate of Adam after the warm-up.
        warmup_steps: steps of the linear warm-up.
        ema_decay: decay of the moving average of the trained parameters.
        ema_start: share of the steps, in [0, 1], after which averaging starts.
        ema_warmup: whether the decay is at most (1 + s) / (10 + s) after s averaged steps.
    """

    train_steps: int | None
    epochs: int | None
    batch_size: int
    learning_rate: float
    warmup_steps: int
    ema_decay: float
    ema_start: float
    ema_warmup: bool = True

    @classmethod
    def of(cls, training: ContinualTrainingArguments, prefix: str) -> PhaseSettings:
        """Take the arguments with the prefix "base" or "adapter"."""
        return cls(**{one.name: getattr(training, f"{prefix}_{one.name}") for one in fields(cls)})


@dataclass(frozen=True)
class Phase:
    """One part of training, with an optimizer of its own.

    Args:
        name: unique in the run; checkpoints and seeds are named after it, so it must not depend on processes or on order.
        class_ids: classes whose real images it reads.
        settings: its optimization settings.
        independent: True: one process trains it alone, while others train other phases. False: all processes share every
            batch of it.
    """

    name: str
    class_ids: tuple[int, ...]
    settings: PhaseSettings
    independent: bool


@dataclass
class Trainable:
    """What a phase trains.

    Args:
        module: an `nn.Module`, called in the forward pass.
        parameters: the trained parameters by name, in an order that never changes.
        buffers: buffers that training also changes, by name, such as the running means of batch normalization.
    """

    module: Any
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Batch:
    """One batch, on the device except for the classes, which are read as numbers.

    Args:
        sample: real images, `(batch, channels, height, width)`, float32 in [-1, 1].
        class_ids: `(batch,)`, int64, on the CPU.
        noise: standard normal, same shape as `sample`.
        sigma: `(batch,)`, float32 in [0, 1].
        number: number of the batch in its phase, from 0; a strategy must distinguish batches only by this.
    """

    sample: torch.Tensor
    class_ids: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    number: int = 0

    def reordered(self, order: torch.Tensor) -> Batch:
        """Return the same samples in another order, `(batch,)`, int64, on the CPU."""
        moved = on_device(order, self.sample.device)
        on_the_device = {name: getattr(self, name)[moved] for name in ("sample", "noise", "sigma")}
        return replace(self, class_ids=self.class_ids[order], **on_the_device)


class Strategy(ABC):
    """How to learn one task after another."""

    name: ClassVar[str]
    options_class: ClassVar[type | None] = None
    """Dataclass of what `--strategy_options` may set, validated at construction; None: there are no options."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """What it needs from the setting, checked before the start: "all_tasks" (images of every task at once). Anything else
    ("text", "past_adapters") is refused, since no setting provides it."""
    trains_own_base: ClassVar[bool] = False
    """True: task 1 trains another base than that of other strategies, so the run cannot start from a given one."""
    grows_with_tasks: bool = False
    """True: what is kept grows. Otherwise the trainer checks that the amount stays constant from the second task on, without
    what `memory_report` counts as "per_class"."""
    learning_changes_past_classes: ClassVar[bool] = True
    """False: the samples of a class never change after its task."""
    has_frozen_base: ClassVar[bool] = False
    """True: the base never changes after task 1, nor a class after its own task; both are checked at the end."""
    prefix: ClassVar[str] = "adapter"
    """Whether a task uses learning rate, warm-up and moving average of the "base" or of an "adapter"."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @classmethod
    def known_options(cls) -> list[str]:
        """Names of the options."""
        return [] if cls.options_class is None else [option.name for option in fields(cls.options_class)]

    @classmethod
    def make_options(cls, given: Mapping[str, Any] | list[str]) -> Any:
        """Make an `options_class` of the options; None if the strategy has no options.

        Raises:
            ValueError: an option that the strategy does not know, or a value out of its range.
        """
        known, given = cls.known_options(), parse_options(given) or {}
        unknown = sorted(given.keys() - known)
        if unknown:
            expected = f"some of: {', '.join(map(repr, known))}" if known else "none: it has no options"
            raise ValueError(
                f"`strategy_options` has {', '.join(map(repr, unknown))}, but `strategy` {cls.name!r} expects {expected}."
            )
        if cls.options_class is None:
            return None
        try:
            options = cls.options_class(**given)
        except TypeError as error:
            raise ValueError(
                f"`strategy_options` is {given} with a value of the wrong kind for `strategy` {cls.name!r}: {error}."
            ) from error
        check_field_types(options)
        return options

    @property
    def method_name(self) -> str | None:
        """The method of a class's adapter, a key of `PEFT_METHODS`; None if the strategy has no adapters."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Raise a ValueError for a setting that cannot work, before anything is written or trained."""

    def begin_task(self, task: Task) -> None:  # noqa: B027 - most strategies have nothing to do here
        """Called before the phases of a task, by every process; also when a run resumes in the middle of the task."""

    @abstractmethod
    def phases(self, task: Task) -> Iterable[Phase]:
        """Return the phases of a task, in order."""

    def replay_evaluations(self, task: Task) -> int:
        """Count the evaluations of the U-Net, each for one image, that draw the images of past classes for a task."""
        return 0

    @abstractmethod
    def is_finished(self, phase: Phase) -> bool:
        """Return whether the phase's complete result is on disk."""

    @abstractmethod
    def build(self, phase: Phase) -> Trainable:
        """Build what the phase trains, at its start."""

    def build_update(self, class_id: int) -> Trainable:
        """Build what `--update_class` trains again: the adapter of one class. For strategies with a `method_name`."""
        raise NotImplementedError

    def make_batch(self, phase: Phase, real: Batch) -> Batch:
        """Return the batch to train on, given a batch of real images."""
        return real

    @abstractmethod
    def training_step(self, phase: Phase, batch: Batch, module: nn.Module) -> torch.Tensor:
        """Return the loss of each sample, `(batch,)`, without a backward. `module` is the phase's, maybe wrapped for several processes."""

    def after_step(self, phase: Phase) -> None:  # noqa: B027
        """Called after every optimiser step."""

    @abstractmethod
    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        """Write the phase's result; the parameters have the values of their moving average. Only one process calls this."""

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:  # noqa: B027
        """Free what `build` made; every process that built the phase calls this, also after an error."""

    def end_task(self, task: Task) -> None:  # noqa: B027
        """Merge, store, free; every process calls this when all results of the task are on disk."""

    @abstractmethod
    def inference(self, class_ids: Sequence[int]) -> AbstractContextManager[FunLoraPipeline]:
        """Return a context that gives a pipeline which samples these classes with the right weights."""

    def parameters_per_class(self) -> dict[str, int | None]:
        """Count the parameters stored for a class: "parameters_per_class" without, "parameters_per_class_with_vector" with the
        class vector; None if the strategy stores none."""
        return {"parameters_per_class": None, "parameters_per_class_with_vector": None}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what must survive a restart in addition to the results on disk; stored after `end_task`."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:  # noqa: B027
        """Load what `state_dict` gave; called instead of a task's phases and `end_task` if the task is over."""

    @abstractmethod
    def memory_report(self) -> dict[str, int]:
        """Count the bytes kept between tasks ("persistent"), the part of them that every class needs for itself, such as its row
        of the class embedding ("per_class"), and the bytes needed while training ("transient")."""

    def own_classifier(self) -> nn.Module | None:
        """Return the classifier that the strategy has trained itself, to the logits of the classes seen, in order; None: it
        trains none."""
        return None


def velocity_losses(module: nn.Module, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
    """Compute the flow-matching loss of each sample, `(batch,)`.

    `module` is a U-Net; `labels` are rows of its class embedding, `(batch,)`, int64, on the CPU or the device.
    """
    return losses_at(module, batch.sample, batch.noise, batch.sigma, on_device(labels, batch.sample.device))


def tensor_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a safetensors file, without its header."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def folder_bytes(folders: Iterable[Path]) -> int:
    """Return the bytes of the weight files below some folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors"))
