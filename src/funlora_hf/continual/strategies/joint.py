"""The upper bound: one generator, trained on the images of all tasks at once.

Source: arXiv 2510.02631, upper bounds [text].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ...data.tasks import Task
from ...sampling.pipeline import FunLoraPipeline
from ..base import base_shape, label_rows, load_pipeline, save_base, trainable_unet
from ..strategy import (
    Batch,
    Phase,
    PhaseSettings,
    Setting,
    Strategy,
    Trainable,
    folder_bytes,
    velocity_losses,
)
from .sequential import check_one_generator


class Joint(Strategy):
    """Trains all classes together, with as many optimiser steps as funlora does for all tasks [ours]."""

    name = "joint"
    prefix = "base"
    requires = frozenset({"all_tasks"})
    learning_changes_past_classes = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.model_dir = setting.output_dir / "model"
        self.class_ids = setting.seen(setting.tasks[-1])
        self._pipe: FunLoraPipeline | None = None

    def check(self) -> None:
        training = self.setting.training
        check_one_generator(self, ())
        base_shape(self.setting)
        if (training.base_train_steps is None) != (training.adapter_train_steps is None):
            raise ValueError(
                "`strategy` 'joint' trains as many steps as base and adapters together: give `base_train_steps` and "
                "`adapter_train_steps`, or `base_epochs` and `adapter_epochs`."
            )

    def phases(self, task: Task) -> list[Phase]:
        if task.index > 0:
            return []
        training = self.setting.training
        base = PhaseSettings.of(training, self.prefix)
        if base.train_steps is not None and training.adapter_train_steps is not None:
            later = len(self.class_ids) - len(task.class_ids)
            # Epochs over more images have more steps by themselves; a number of steps must be raised.
            base = replace(base, train_steps=base.train_steps + later * training.adapter_train_steps)
        return [Phase("joint", self.class_ids, base, independent=False)]

    def is_finished(self, phase: Phase) -> bool:
        return self.model_dir.is_dir()

    def build(self, phase: Phase) -> Trainable:
        return trainable_unet(self.setting, len(self.class_ids))

    def training_step(self, phase: Phase, batch: Batch, module: nn.Module) -> torch.Tensor:
        return velocity_losses(module, batch, label_rows(self.class_ids, batch.class_ids))

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        save_base(trainable.module.eval(), self.model_dir, self.class_ids, self.setting.class_names)

    @contextmanager
    def inference(self, class_ids: Sequence[int]) -> Iterator[FunLoraPipeline]:
        if self._pipe is None:
            self._pipe = load_pipeline(self.model_dir, self.setting)
        yield self._pipe

    def memory_report(self) -> dict[str, int]:
        persistent = folder_bytes([self.model_dir])
        return {"persistent": persistent, "per_class": 0, "transient": 4 * persistent}
