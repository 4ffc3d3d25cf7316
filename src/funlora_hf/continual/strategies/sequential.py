"""The base class of strategies that train one generator of all classes, task after task.

Task 1 trains the base, as for all strategies. Each later task writes the generator to one file, and only the newest is kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import UNet2DModel
from torch import nn

from ...adapters.untrusted_base import base_classes
from ...data.tasks import Task
from ...sampling.pipeline import FunLoraPipeline
from ...utils.files import read_tensors, write_tensors
from ..base import (
    BASE_PHASE,
    arrange,
    base_shape,
    label_rows,
    make_pipeline,
    save_base,
    set_class_vectors,
    trainable_unet,
)
from ..config import COLD, SAMPLE
from ..strategy import (
    Batch,
    Phase,
    PhaseSettings,
    Setting,
    Strategy,
    Trainable,
    folder_bytes,
    tensor_bytes,
    velocity_losses,
)
from .peft_methods import RATES, check_unused


# Kept after every task.
CLASS_VECTORS = "class_embedding.weight"
# Arguments of a class's own adapter, with the values that change nothing.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "adapter_start": (COLD,),
    "adapter_target": (SAMPLE,),
    "adapter_pairs": (False,),
    **dict.fromkeys(RATES.values(), (1, None)),
}


@dataclass(frozen=True)
class KeptFile:
    """One safetensors file for each task; a later one replaces the earlier ones."""

    folder: Path

    def path(self, task: Task) -> Path:
        """Return the path of a task's file."""
        return self.folder / f"task_{task.index + 1}.safetensors"

    def newest(self, tasks: Sequence[Task]) -> Task | None:
        """Return the last of these tasks that has a file, or None."""
        return next((task for task in reversed(tasks) if self.path(task).is_file()), None)

    def save(self, task: Task, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the file of a task, whole or not at all."""
        # Copies, since two names may share one tensor, which the format refuses.
        copies = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        write_tensors(self.path(task), copies)

    def load(self, task: Task | None) -> dict[str, torch.Tensor]:
        """Return the tensors of a task on the CPU; none for None."""
        remedy = "the generator of its task is lost; start again with --overwrite_output_dir"
        return {} if task is None else read_tensors(self.path(task), remedy=remedy)

    def drop_before(self, task: Task, tasks: Sequence[Task]) -> None:
        """Delete the files of earlier tasks; several processes may do so at once."""
        for earlier in tasks[: task.index]:
            self.path(earlier).unlink(missing_ok=True)


class Sequential(Strategy):
    """One generator for all classes. Its class embedding gets rows for a task's classes when the task begins."""

    needs_base = True
    """Whether sampling after a later task needs the base in addition to what is kept."""
    trains_base: ClassVar[bool] = True
    """False: the base is there, and task 1 is learned like any other."""
    takes: tuple[str, ...] = ()
    """The `ADAPTER_ARGUMENTS` that it uses."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.options = self.make_options(setting.training.strategy_options or {})
        self.model_dir = setting.output_dir / "model"
        self.kept = KeptFile(setting.output_dir / "checkpoints" / "generator")
        self._sampled: tuple[Task | None, FunLoraPipeline] | None = None

    @abstractmethod
    def trainable(self, unet: UNet2DModel, kept: Mapping[str, torch.Tensor]) -> Trainable:
        """Build what a task trains; `CLASS_VECTORS` is one of its parameters.

        Args:
            unet: the base, with vectors of all classes seen, including this task's.
            kept: what `learned` returned for the previous task; empty after the base.
        """

    @abstractmethod
    def learned(self, trainable: Trainable, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what to keep of a task, to which the class vectors are added: the next task gets it as `kept`."""

    @abstractmethod
    def load(self, unet: UNet2DModel, kept: Mapping[str, torch.Tensor]) -> None:
        """Turn a base with the vectors of all classes seen into the generator, in place."""

    def check(self) -> None:
        setting = self.setting
        check_one_generator(self, self.takes)
        base_shape(setting)
        if not setting.has_base:
            return
        rows, known = base_classes(setting.base_dir), setting.tasks[0].class_ids
        if list(rows) != list(known):
            raise ValueError(
                f"`base_model` knows the classes {list(known)}, including those of adapters, but its U-Net itself only "
                f"{list(rows)}: `strategy` {self.name!r} needs a base without adapters."
            )

    def phases(self, task: Task) -> list[Phase]:
        if task.index == 0 and self.trains_base:
            if self.setting.has_base:
                return []
            settings = PhaseSettings.of(self.setting.training, "base")
            return [Phase(BASE_PHASE, task.class_ids, settings, independent=False)]
        return [Phase(f"task_{task.index + 1}", task.class_ids, self.phase_settings(task), independent=False)]

    def phase_settings(self, task: Task) -> PhaseSettings:
        """Settings in which each class is seen as often as by funlora, which trains the classes one by one."""
        return self.scaled(len(task.class_ids))

    def scaled_to_seen(self, task: Task) -> PhaseSettings:
        """Settings in which each class seen so far, old or new, is seen as often as by funlora: the steps grow with the tasks."""
        seen = len(self.setting.seen(task))
        settings = self.scaled(seen)
        # An epoch counts only the images of new classes.
        epochs = None if settings.epochs is None else -(-settings.epochs * seen // len(task.class_ids))
        return replace(settings, epochs=epochs)

    def scaled(self, num_classes: int) -> PhaseSettings:
        """Settings for the images of several classes at once: steps, epochs and batch of an adapter, the rest by `prefix`.

        Each of `num_classes` is seen as often as an adapter's class, for which steps are multiplied; epochs need not be.
        """
        training = self.setting.training
        adapter = PhaseSettings.of(training, "adapter")
        steps = None if adapter.train_steps is None else adapter.train_steps * num_classes
        own = PhaseSettings.of(training, self.prefix)
        return replace(own, train_steps=steps, epochs=adapter.epochs, batch_size=adapter.batch_size)

    def is_finished(self, phase: Phase) -> bool:
        if phase.name == BASE_PHASE:
            return self.setting.base_dir.is_dir()
        return self.kept.newest(self.setting.tasks[self.task_of(phase).index :]) is not None

    def build(self, phase: Phase) -> Trainable:
        if phase.name == BASE_PHASE:
            return trainable_unet(self.setting, len(phase.class_ids))
        task = self.task_of(phase)
        trainable = self.trainable(*self._unet(task, self.kept.load(self.before(task))))
        trainable.module.train()
        return trainable

    def before(self, task: Task) -> Task | None:
        """Return the task on which the generator was last trained before this one; None: only the base was trained."""
        return self.kept.newest(self.setting.tasks[: task.index])

    def training_step(self, phase: Phase, batch: Batch, module: nn.Module) -> torch.Tensor:
        seen = self.setting.seen(self.task_of(phase))
        losses = velocity_losses(module, batch, label_rows(seen, batch.class_ids))
        # Squares of small numbers would be 0 in half precision.
        with torch.autocast(self.setting.device.type, enabled=False):
            return losses + self.penalty()

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        setting = self.setting
        if phase.name == BASE_PHASE:
            save_base(trainable.module.eval(), setting.base_dir, phase.class_ids, setting.class_names)
            return
        task = self.task_of(phase)
        before = {name: tensor.to(setting.device) for name, tensor in self.kept.load(self.before(task)).items()}
        kept = {**self.learned(trainable, before), CLASS_VECTORS: trainable.parameters[CLASS_VECTORS]}
        if task == setting.tasks[-1]:
            save_base(self._generator(task, kept), self.model_dir, setting.seen(task), setting.class_names)
        # Last, since it says that the phase is finished.
        self.kept.save(task, kept)

    def end_task(self, task: Task) -> None:
        self.kept.drop_before(task, self.setting.tasks)

    @contextmanager
    def inference(self, class_ids: Sequence[int]) -> Iterator[FunLoraPipeline]:
        yield self.sampler(self.kept.newest(self.setting.tasks))

    def sampler(self, task: Task | None) -> FunLoraPipeline:
        """Return a pipeline with the generator after a task; None: the base."""
        if self._sampled is None or self._sampled[0] != task:
            known = self.setting.tasks[0] if task is None else task
            unet = self._generator(known, self.kept.load(task))
            arrange(unet, self.setting.training, compiled=False)
            self._sampled = (task, make_pipeline(unet, self.setting.seen(known), self.setting.class_names))
        return self._sampled[1]

    def memory_report(self) -> dict[str, int]:
        newest = self.kept.newest(self.setting.tasks)
        base = folder_bytes([self.setting.base_dir])
        report = {"persistent": base, "per_class": 0, "transient": 4 * self.trained_bytes(base)}
        if newest is not None:
            report["persistent"] = tensor_bytes(self.kept.path(newest)) + (base if self.needs_base else 0)
            report["per_class"] = self.kept.load(newest)[CLASS_VECTORS].nbytes
        return report

    @abstractmethod
    def trained_bytes(self, base: int) -> int:
        """Return the bytes of the parameters that a task trains; the whole base has `base`.

        Each of Adam's two moments, the moving average and the gradient takes the same again.
        """

    def _generator(self, task: Task, kept: Mapping[str, torch.Tensor]) -> UNet2DModel:
        """Return the generator after a task, for sampling."""
        unet, kept = self._unet(task, kept)
        self.load(unet, kept)
        return unet.eval()

    def _unet(self, task: Task, kept: Mapping[str, torch.Tensor]) -> tuple[UNet2DModel, dict[str, torch.Tensor]]:
        """Return the base with vectors for the classes up to a task, and the other kept tensors, on the run's device."""
        device = self.setting.device
        unet = UNet2DModel.from_pretrained(self.setting.base_dir, subfolder="unet", use_safetensors=True).to(device)
        kept = {name: tensor.detach().to(device) for name, tensor in kept.items()}
        vectors = kept.pop(CLASS_VECTORS, unet.class_embedding.weight.detach())
        set_class_vectors(unet, vectors, len(self.setting.seen(task)))
        # Otherwise diffusers would write the base's local path.
        unet.register_to_config(_name_or_path="")
        return unet, kept


def check_one_generator(strategy: Strategy, takes: Collection[str]) -> None:
    """Raise a ValueError unless the setting suits a strategy with one generator, which `takes` these `ADAPTER_ARGUMENTS`."""
    setting = strategy.setting
    check_unused(setting.model, takes, f"`strategy` {strategy.name!r}")
    if setting.training.class_batches != "homogeneous":
        raise ValueError(
            f"`class_batches` is {setting.training.class_batches!r}, which `strategy` {strategy.name!r} does not use, since it "
            "trains its classes together: leave it out."
        )
    for name, unused in _UNUSED.items():
        if (value := getattr(setting.training, name)) not in unused:
            shown = f"{value:g}" if isinstance(value, float) else repr(value)
            raise ValueError(f"`{name}` is {shown}, which `strategy` {strategy.name!r} does not use: leave it out.")
