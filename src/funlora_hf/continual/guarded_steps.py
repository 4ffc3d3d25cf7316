"""Optimizer steps that change nothing if the loss or the gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from accelerate import Accelerator

from .checkpoint import TrainingState


# fp16 starts with a scale of 2^16 and halves it at each gradient that overflows, so up to 16 steps may be skipped in a row.
HALVINGS = 16


class Outcome(IntEnum):
    """The outcome of a step."""

    DONE = 0
    NO_GRADIENT = 1
    NO_LOSS = 2


class GuardedSteps:
    """Steps of an optimizer and its moving average, and a count of the skipped ones, which change nothing else.

    A flag on the device tells a fused optimizer to do nothing, so no process has to wait. For other optimizers the flag is
    read, and they are not called; so use a fused one where reading is slow.

    Args:
        state: what is trained, and the count.
        shared: processes share each step, so all of them skip it if one has to.
        max_grad_norm: the norm to which gradients are clipped; None: no clipping.
    """

    def __init__(
        self, state: TrainingState, accelerator: Accelerator, *, shared: bool, max_grad_norm: float | None
    ) -> None:
        self.state = state
        self.accelerator = accelerator
        self.asks_others = shared and accelerator.num_processes > 1
        self.max_grad_norm = max_grad_norm
        self._parameters = tuple(state.parameters.values())
        self._optimizer = accelerator.prepare_optimizer(state.optimizer)
        self._fused = bool(state.optimizer.defaults.get("fused"))
        self._scaled = accelerator.scaler is not None
        self._buffers: list[torch.Tensor] = []

    def begin(self) -> None:
        """Call this before the first forward pass of a step, which may change buffers."""
        self._buffers = [buffer.clone() for buffer in self.state.buffers.values()]

    def end(self, losses: Sequence[torch.Tensor]) -> torch.Tensor:
        """Call this after the last backward pass: do the step, or nothing.

        Args:
            losses: scalar losses of all passes on this process.

        Returns:
            The `Outcome`, a scalar on the device, the same on all processes that share the step.
        """
        no_loss = ~torch.isfinite(torch.stack(list(losses))).all()
        if self.asks_others:
            no_loss = self.accelerator.reduce(no_loss.float(), reduction="sum") > 0
        no_gradient = ~torch.isfinite(self._norm(no_loss))
        skipped = no_loss | no_gradient
        if self._fused:
            self._step_unless(skipped)
        elif skipped:
            self.state.ema.optimization_step += 1
        else:
            self._optimizer.step()
            self.state.ema.step(self._parameters)
        self._optimizer.zero_grad()
        for buffer, before in zip(self.state.buffers.values(), self._buffers, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))
        return torch.where(no_loss, int(Outcome.NO_LOSS), no_gradient.int())

    def count(self, outcome: Outcome) -> None:
        """Count a step when its outcome has been read."""
        skipped = self.state.skipped
        if outcome is Outcome.DONE:
            skipped["in_row"] = skipped["rescaled_in_row"] = 0
            return
        skipped["total"] += 1
        # That the gradient of a scaled loss overflows is not an error of the phase.
        rescaled = outcome is Outcome.NO_GRADIENT and self._scaled
        skipped["rescaled_in_row" if rescaled else "in_row"] += 1

    def exceed(self, limit: int) -> bool:
        """Return whether more than `limit` steps in a row were skipped."""
        skipped = self.state.skipped
        return skipped["in_row"] > limit or skipped["rescaled_in_row"] > limit + HALVINGS

    def _norm(self, no_loss: torch.Tensor) -> torch.Tensor:
        """Clip the gradient and return its norm before. Adam squares gradients, so one whose norm overflows is useless, too."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._scaled and gradients:
            # The scaler looks only at gradients.
            gradients[0].masked_fill_(no_loss, math.inf)
        if self.max_grad_norm is None:
            return torch.nn.utils.get_total_norm(gradients)
        return self.accelerator.clip_grad_norm_(self._parameters, self.max_grad_norm)

    def _step_unless(self, skipped: torch.Tensor) -> None:
        if not self._scaled:
            # torch reads this in a fused step.
            self.state.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        ema = self.state.ema
        ema.optimization_step += 1
        # As in EMAModel.step, but with a difference of 0 if the step is skipped.
        difference = torch._foreach_sub(ema.shadow_params, self._parameters)
        torch._foreach_mul_(difference, (~skipped).float())
        torch._foreach_sub_(ema.shadow_params, difference, alpha=1 - ema.get_decay(ema.optimization_step))
