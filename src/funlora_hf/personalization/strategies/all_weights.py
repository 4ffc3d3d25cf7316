"""Strategies that train all weights of the denoiser, concept after concept: the rules are those of classes.

Source: T2I-ConBench, arXiv 2505.16875 [code]; that tokens are trained beside the weights, and not protected, is [ours].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...continual.learning import Phase, PhaseSettings, Trainable
from ...continual.strategies.all_weights import AllWeights
from ...continual.strategies.ewc import EwcRule
from ...continual.strategies.hft import HftRule
from ...continual.strategies.l2 import L2Rule
from ...continual.strategies.merging_rules import Kept, only
from ...continual.strategies.mofo import MofoRule
from ...data.tasks import Task
from .base import Rates
from .one_model import FullWeights


class Finetune(AllWeights, FullWeights):
    """The lower bound: trains all weights of the denoiser on each concept, and forgets earlier ones. Weights are kept, not changes."""

    name = "finetune"
    takes = ()
    rates = Rates(1e-4, 5e-6)

    def target_modules(self) -> list[str]:
        """Return the names of all parameters."""
        return [name for name, _ in self.model.denoiser.named_parameters()]

    def weight(self, name: str) -> nn.Parameter:
        return self.model.denoiser.get_parameter(name)

    def build(self, phase: Phase) -> Trainable:
        trainable = super().build(phase)
        self.protect(phase, trainable, self._weights())
        return trainable

    def adapted(self, kept: Kept) -> dict[str, nn.Parameter]:
        self.model.denoiser.requires_grad_(True)
        return self._weights()

    def learned(self, kept: Kept) -> dict[str, torch.Tensor]:
        return {f"{name}/weight": weight.detach() for name, weight in self._weights().items()}

    def deltas(self, kept: Kept) -> Mapping[str, torch.Tensor]:
        """Return the weights themselves: a tensor that no task trains stays equal to the bit."""
        return only(kept, "weight")

    @torch.no_grad()
    def put(self, deltas: Mapping[str, torch.Tensor]) -> None:
        for name, original in self._originals.items():
            self.weight(name).copy_(deltas.get(name, original))

    def memory_report(self) -> dict[str, int]:
        report = super().memory_report()
        return {**report, "transient": report["transient"] + self.copies * 4 * self.trained_numbers()}

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: self.weight(name) for name in self._originals}

    def _cast(self, dtype: torch.dtype | None) -> None:
        for name, original in self._originals.items():
            weight = self.weight(name)
            weight.data = weight.data.to(dtype or original.dtype)


class L2(L2Rule, Finetune):
    """Trains all weights, and pulls them towards their values before the task."""


class Hft(HftRule, Finetune):
    """Trains the weights but for the frozen tensors."""


class Mofo(MofoRule, Finetune):
    """Trains all weights, in each step the entries with the largest momentum."""


class Ewc(EwcRule, Finetune):
    """Trains all weights, and pulls them towards their values before the task, those that earlier concepts need more."""

    def after(self, task: Task) -> tuple[nn.Module, Mapping[str, nn.Parameter]]:
        self._cast(torch.float32)
        self.put(self.deltas(self.load(self.setting.tasks[: task.index + 1])))
        # From their files: in memory, they may have their start values.
        self._loaded.clear()
        self.load_rows(self.setting.seen(task))
        return self.model, self._weights()

    def fisher_settings(self, task: Task) -> PhaseSettings:
        return self.phase_settings()
