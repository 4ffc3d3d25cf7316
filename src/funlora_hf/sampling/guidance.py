"""Steer sampling by the gradient of a score of the estimated image.

Source: GUIDE (arXiv 2403.03938) has it for DDIM [code]; the form for flow matching is [ours].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def estimate_sample(state: torch.Tensor, sigma: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """Estimate the image at the end of a straight path from a state, `x - sigma v`.

    Args:
        state: `(batch, ...)`.
        sigma: scalar, in [0, 1].
        velocity: dx/dsigma, of the shape of `state`.

    Returns:
        Same shape as `state`.

    Source: with t = 1 - sigma, `x_t + (1 - t) v_t` [ours].
    """
    return state - sigma * velocity


@dataclass(frozen=True)
class Guidance:
    """Steers samples towards a higher score: `v - s min(sigma / (1 - sigma), c) grad_x score(x - sigma v)`.

    The gradient also goes through the model. Pass it to [`FunLoraPipeline`] as `guidance`.

    Args:
        score: function of estimated images, `(batch, channels, height, width)` in [-1, 1], that returns a log-probability
            for each, `(batch,)`.
        scale: s; with 0 the samples are bit-identical to those without guidance.
        most: c, the largest weight; without it, the weight would be infinite at sigma = 1.

    Raises:
        ValueError: `scale` is not finite, or `most` is not a finite number above 0.
    """

    score: Callable[[torch.Tensor], torch.Tensor]
    scale: float
    most: float = 10.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"`scale` is {self.scale}, expected a finite number.")
        if not 0 < self.most < math.inf:
            raise ValueError(f"`most` is {self.most}, expected a finite number above 0.")

    def __call__(self, velocity: Velocity, sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return the guided velocity.

        Args:
            velocity: function of a scalar sigma and a state that returns dx/dsigma.
            sigma: scalar, in [0, 1].
            state: `(batch, ...)`.

        Returns:
            Same shape as `state`, without a graph.

        Raises:
            ValueError: a score of another shape.
        """
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            unguided = velocity(sigma, state)
            score = self.score(estimate_sample(state, sigma, unguided))
            if score.shape != (len(state),):
                raise ValueError(
                    f"`score` gave the shape {tuple(score.shape)}, expected ({len(state)},): one number for each image."
                )
            (gradient,) = torch.autograd.grad(score.sum(), state)
        # At sigma = 1 the quotient is infinite, which `clamp` handles.
        weight = (sigma / (1 - sigma)).clamp(max=self.most)
        return unguided.detach() - self.scale * weight * gradient
