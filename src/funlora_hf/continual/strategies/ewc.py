# mypy: disable-error-code="safe-super"
# The methods that the rule extends are abstract only in its own bases.
"""Elastic weight consolidation: fine-tuning with a penalty on changes of those weights that earlier tasks are sensitive to.

Source: arXiv 1612.00796 [recall]; form and numbers of T2I-ConBench, arXiv 2505.16875, baseline ewc [code]. One running mean of the tasks'
Fishers, each measured at the end of its task, is [ours]; that code measures them at the pretrained weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from accelerate.utils import reduce
from torch import nn

from ...data.tasks import Task
from ...utils.field_types import Count, Range
from ..learning import Phase, PhaseSettings, Trainable
from ..strategy import tensor_bytes
from .all_weights import AllWeights
from .finetune import Finetune
from .merging_rules import RuleOptions
from .sequential import CLASS_VECTORS, KeptFile


# Phases that measure a Fisher.
_FISHER = "fisher_"
# Beside the tensors of the weights: over how many tasks or batches they go.
_COUNT = "count"


@dataclass
class EwcOptions(RuleOptions):
    """
    Args:
        penalty: lambda; 0 is plain fine-tuning [code: 1e-4].
        fisher_batches: batches in which the Fisher of a task is measured [code: 100].
    """

    penalty: Annotated[float, Range(0, 1e12)] = 1e-4
    fisher_batches: Count = 100


class EwcRule(AllWeights):
    """Pulls weights towards their values before the task: + lambda sum F (theta - theta_{t-1})^2.

    F is the mean of the earlier tasks' Fishers. The Fisher of a task is the mean over batches of the squared gradient of the task's loss, at
    the weights after the task. It is measured in a phase of its own, whose checkpoints have the sums.
    """

    name, options_class = "ewc", EwcOptions
    copies = 1
    _terms: tuple[tuple[nn.Parameter, torch.Tensor, torch.Tensor], ...] = ()
    _measured: tuple[nn.Module, Mapping[str, nn.Parameter]]
    _sums: dict[str, torch.Tensor]

    @abstractmethod
    def after(self, task: Task) -> tuple[nn.Module, Mapping[str, nn.Parameter]]:
        """Return the generator after a task, for evaluation, and its weights by name."""

    @abstractmethod
    def fisher_settings(self, task: Task) -> PhaseSettings:
        """Return settings with the batch size for a task's Fisher."""

    def has_images(self, task: Task) -> bool:
        """Return whether the Fisher of a task can be measured."""
        return True

    @property
    def fisher(self) -> KeptFile:
        """The mean of the tasks' Fishers, by weight, and their number."""
        return KeptFile(self.setting.output_dir / "checkpoints" / "fisher")

    def phases(self, task: Task) -> list[Phase]:
        phases = list(super().phases(task))
        if self.has_images(task):
            steps = self.options.fisher_batches
            settings = replace(self.fisher_settings(task), train_steps=steps, epochs=None, warmup_steps=0)
            phases.append(Phase(f"{_FISHER}{task.index + 1}", task.class_ids, settings, independent=False))
        return phases

    def is_finished(self, phase: Phase) -> bool:
        if not _is_fisher(phase):
            return super().is_finished(phase)
        return self.fisher.newest(self.setting.tasks[self.task_of(phase).index :]) is not None

    def build(self, phase: Phase) -> Trainable:
        if not _is_fisher(phase):
            return super().build(phase)
        self._measured = module, weights = self.after(self.task_of(phase))
        module.requires_grad_(False).eval()
        for weight in weights.values():
            weight.requires_grad_()
        self._sums = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
        self._sums[_COUNT] = torch.zeros((), device=self.setting.device)
        sink = _Sink().to(self.setting.device)
        return Trainable(sink, dict(sink.named_parameters()), buffers=self._sums)

    def training_step(self, phase: Phase, batch: Any, module: nn.Module) -> torch.Tensor:
        if not _is_fisher(phase):
            return super().training_step(phase, batch, module)
        measured, weights = self._measured
        # In float32: squares of small gradients would be 0 in half precision.
        with torch.autocast(self.setting.device.type, enabled=False):
            losses = super().training_step(phase, batch, measured)
            loss = losses.sum() / phase.settings.batch_size
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        # Each process has a share of the batch.
        for name, gradient in zip(weights, reduce(list(gradients), "sum"), strict=True):
            self._sums[name] += gradient.square()
        self._sums[_COUNT] += 1
        return module(losses.detach())

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        if not _is_fisher(phase):
            super().end_phase(phase, trainable)
            return
        task = self.task_of(phase)
        before = self._before(task)
        count = before.get(_COUNT, torch.zeros(())) + 1
        batches = self._sums[_COUNT]
        own = {name: total / batches for name, total in self._sums.items() if name != _COUNT}
        means = {name: before[name] + (one - before[name]) / count if before else one for name, one in own.items()}
        self.fisher.save(task, {**means, _COUNT: count})

    def protect(self, phase: Phase, trainable: Trainable, weights: Mapping[str, nn.Parameter]) -> None:
        fisher = self._before(self.task_of(phase))
        if fisher:
            self._terms = tuple((one, one.detach().clone(), fisher[name]) for name, one in weights.items())

    def penalty(self) -> torch.Tensor | float:
        terms = [(fisher * (weight - start).square()).sum() for weight, start, fisher in self._terms]
        return self.options.penalty * torch.stack(terms).sum() if terms else 0.0

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self._terms = ()
        if _is_fisher(phase):
            del self._measured, self._sums

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.fisher.drop_before(task, self.setting.tasks)

    def memory_report(self) -> dict[str, int]:
        report = super().memory_report()
        newest = self.fisher.newest(self.setting.tasks)
        fisher = 0 if newest is None else tensor_bytes(self.fisher.path(newest))
        return {**report, "persistent": report["persistent"] + fisher}

    def _before(self, task: Task) -> dict[str, torch.Tensor]:
        """Return the mean of the Fishers of the tasks before one, on the run's device; empty if there are none."""
        kept = self.fisher.load(self.fisher.newest(self.setting.tasks[: task.index]))
        return {name: tensor.to(self.setting.device) for name, tensor in kept.items()}


class Ewc(EwcRule, Finetune):
    """Trains the whole U-Net, and pulls weights towards their values before the task, those that earlier classes need more."""

    def after(self, task: Task) -> tuple[nn.Module, Mapping[str, nn.Parameter]]:
        newest = self.kept.newest(self.setting.tasks[: task.index + 1])
        unet = self._generator(task, self.kept.load(newest))
        return unet, {name: one for name, one in unet.named_parameters() if name != CLASS_VECTORS}

    def fisher_settings(self, task: Task) -> PhaseSettings:
        return self.phase_settings(task)

    def has_images(self, task: Task) -> bool:
        return not self.setting.has_base or all(self.setting.num_images.get(class_id) for class_id in task.class_ids)


class _Sink(nn.Module):
    """The module of a phase that trains nothing: its parameter stays 0, and gives losses without a graph one."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, losses: torch.Tensor) -> torch.Tensor:
        return losses + 0 * self.zero


def _is_fisher(phase: Phase) -> bool:
    return phase.name.startswith(_FISHER)
