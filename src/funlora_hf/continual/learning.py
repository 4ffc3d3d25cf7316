"""What the trainer asks of every strategy, whether it learns classes or the concepts of prompts.

A task may have several phases; the strategy names them, the trainer runs them. The trainer is responsible for optimizer,
backward pass, moving average, seeds, devices, checkpoints and progress; the strategy decides what is trained, on which batch,
with which loss, and what is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..data.tasks import Task
from ..utils.field_types import check_field_types
from .config import SAMPLE, LoopArguments, parse_options


LR_SCHEDULERS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class LearningSetting:
    """What a strategy may know of any run.

    Args:
        output_dir: the run's folder; a strategy writes its files below it.
        class_names: id -> name of everything that the run learns.
        tasks: all tasks, in order.
        training: steps, rates, seed.
        device: device on which modules are built.
    """

    _: KW_ONLY
    output_dir: Path
    class_names: Mapping[int, str]
    tasks: Sequence[Task]
    training: LoopArguments
    device: torch.device

    def seen(self, task: Task) -> tuple[int, ...]:
        """Return the ids of all classes up to and including a task, in order."""
        return (*self.past(task), *task.class_ids)

    def past(self, task: Task) -> tuple[int, ...]:
        """Return the ids of the classes of earlier tasks, in order."""
        return tuple(class_id for earlier in self.tasks[: task.index] for class_id in earlier.class_ids)


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
        lr_scheduler: the learning rate after the warm-up, one of `LR_SCHEDULERS`.
        weight_decay: decoupled decay of AdamW, in each step multiplied by the learning rate.
        adam_beta1: decay of Adam's mean of gradients, in [0, 1).
        target: velocity to learn, "sample" or "expected" (`expected_velocity`).
        pairs: whether the second half of a batch is the first half with the negative noise; `batch_size` is even then.
    """

    train_steps: int | None
    epochs: int | None
    batch_size: int
    learning_rate: float
    warmup_steps: int
    ema_decay: float
    ema_start: float
    ema_warmup: bool = True
    lr_scheduler: str = "constant"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    target: str = SAMPLE
    pairs: bool = False

    @property
    def images_per_batch(self) -> int:
        """Images of a batch, each of which is counted once if it is there twice."""
        return self.batch_size // 2 if self.pairs else self.batch_size

    @classmethod
    def of(cls, training: LoopArguments, prefix: str) -> PhaseSettings:
        """Take the arguments with a prefix, such as "base" or "adapter"; settings without an argument keep their defaults."""
        names = {one.name: f"{prefix}_{one.name}" for one in fields(cls)}
        return cls(**{name: getattr(training, own) for name, own in names.items() if hasattr(training, own)})


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
        factors: by parameter, the multiple of the phase's learning rate with which it is trained; 1 if absent.
        started_from: adapters that it starts from, with the hashes of their files; a checkpoint of another start is dropped.
    """

    module: Any
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    started_from: Mapping[str, str] = field(default_factory=dict)

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups for an optimizer, one for each factor, which is its entry "factor"."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(self.factors.get(name, 1.0), []).append(parameter)
        return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


class BatchSource(Protocol):
    """The batches of one phase. They depend only on the run's seed, the phase and their number."""

    @property
    def num_images(self) -> int:
        """The number of images that the phase reads."""

    def batch(self, number: int, *, share: int = 0, num_shares: int = 1) -> Any:
        """Return batch `number`, from 0, or the share of it for one of several processes."""


class LearningStrategy(ABC):
    """How to learn one task after another."""

    name: ClassVar[str]
    options_class: ClassVar[type | None] = None
    """Dataclass of what `--strategy_options` may set, validated at construction; None: there are no options."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """What it needs from the setting, checked before the start: "all_tasks" (images of every task at once). Anything else
    ("text", "past_adapters") is refused, since no setting provides it."""
    grows_with_tasks: bool = False
    """True: what is kept grows. Otherwise the trainer checks that the amount stays constant from the second task on, without
    what `memory_report` counts as "per_class"."""
    learning_changes_past_classes: ClassVar[bool] = True
    """False: the samples of a class never change after its task."""
    setting: LearningSetting

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

    def task_of(self, phase: Phase) -> Task:
        """Return the first task whose classes a phase reads."""
        return next(task for task in self.setting.tasks if set(phase.class_ids) & set(task.class_ids))

    def is_past(self, task: Task) -> bool:
        """Return whether the generator after a task is gone, since it has learned a later one."""
        later = (phase for one in self.setting.tasks[task.index + 1 :] for phase in self.phases(one))
        return self.learning_changes_past_classes and any(map(self.is_finished, later))

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

    @abstractmethod
    def is_finished(self, phase: Phase) -> bool:
        """Return whether the phase's complete result is on disk."""

    @abstractmethod
    def build(self, phase: Phase) -> Trainable:
        """Build what the phase trains, at its start."""

    def build_update(self, class_id: int) -> Trainable:
        """Build what `--update_class` trains again: the adapter of one class. For strategies with a `method_name`."""
        raise NotImplementedError

    def make_batch(self, phase: Phase, real: Any) -> Any:
        """Return the batch to train on, given a batch of real images."""
        return real

    @abstractmethod
    def training_step(self, phase: Phase, batch: Any, module: nn.Module) -> torch.Tensor:
        """Return the loss of each sample, `(batch,)`, without a backward. `module` is the phase's, maybe wrapped for several processes."""

    def penalty(self) -> torch.Tensor | float:
        """Return what is added to the mean loss of a batch, computed in float32."""
        return 0.0

    def make_optimizer(self, phase: Phase, trainable: Trainable, **adamw: Any) -> torch.optim.Optimizer:
        """Return the optimizer of a phase, given the arguments of AdamW that its settings come to."""
        return torch.optim.AdamW(trainable.groups(), **adamw)

    def after_step(self, phase: Phase) -> None:  # noqa: B027
        """Called after every optimiser step."""

    @abstractmethod
    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        """Write the phase's result; the parameters have the values of their moving average. Only one process calls this."""

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:  # noqa: B027
        """Free what `build` made; every process that built the phase calls this, also after an error."""

    def end_task(self, task: Task) -> None:  # noqa: B027
        """Merge, store, free; every process calls this when all results of the task are on disk."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what must survive a restart in addition to the results on disk; stored after `end_task`."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:  # noqa: B027
        """Load what `state_dict` gave; called instead of a task's phases and `end_task` if the task is over."""

    @abstractmethod
    def memory_report(self) -> dict[str, int]:
        """Count the bytes kept between tasks ("persistent"), the part of them that every class needs for itself, such as its row
        of the class embedding ("per_class"), and the bytes needed while training ("transient")."""
