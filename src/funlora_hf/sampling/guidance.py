"""Steer sampling by the gradient of a score of the estimated image, or of the noisy one.

Source: GUIDE (arXiv 2403.03938) has the first for DDIM [code], DDGR (ICML 2023) the second for DDPM [code]; the forms for flow
matching are [ours].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..utils.checks import check_choice


GUIDED_AT = ("estimate", "state")

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def estimate_sample(state: torch.Tensor, sigma: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """Estimate the image at the end of a straight path from a state, `x - sigma v`, of the state's shape.

    Args:
        state: `(batch, ...)`.
        sigma: scalar, in [0, 1].
        velocity: dx/dsigma, of the shape of `state`.

    Source: with t = 1 - sigma, `x_t + (1 - t) v_t` [ours].
    """
    return state - sigma * velocity


@dataclass(frozen=True)
class Guidance:
    """Steers samples towards a higher score: `v - s w grad_x score(x - t v)`, t = min(sigma, c / (1 + c)), w = t / (1 - t).

    The gradient also goes through the model. Pass it to [`FunLoraPipeline`] as `guidance`.

    Args:
        score: function of the images that `at` chooses, `(batch, channels, height, width)`, clean ones in [-1, 1], that
            returns a log-probability for each, `(batch,)`.
        scale: s; with 0 the samples are bit-identical to those without guidance.
        largest_weight: c, the largest w; without it, w would be infinite at sigma = 1. Where it limits, the model is evaluated
            once more, at t, which the pipeline's `nfe` does not count.
        at: where the score is taken: "estimate", at the estimated image as above, or "state", at the noisy x itself, with no
            gradient through the model. Choose "state" only for a score that was trained on noisy images.

    Raises:
        ValueError: `scale` is not finite, `largest_weight` is not a finite number above 0, or an unknown `at`.

    Source: "estimate" GUIDE [code], "state" DDGR [code], both for diffusion. t is [ours]: with it, normal data under a linear
        score get the right mean.
    """

    score: Callable[[torch.Tensor], torch.Tensor]
    scale: float
    largest_weight: float = 10.0
    at: str = "estimate"

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"`scale` is {self.scale}, expected a finite number.")
        if not 0 < self.largest_weight < math.inf:
            raise ValueError(f"`largest_weight` is {self.largest_weight}, expected a finite number above 0.")
        check_choice("at", self.at, GUIDED_AT)

    def __call__(self, velocity: Velocity, sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return the guided velocity, of the shape of `state`, without a graph.

        Args:
            velocity: function of a scalar sigma and a state that returns dx/dsigma.
            sigma: scalar, in [0, 1].
            state: `(batch, ...)`.

        Raises:
            ValueError: a score of another shape.
        """
        limited = sigma.clamp(max=self.largest_weight / (1 + self.largest_weight))
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            image = state
            if self.at == "estimate":
                unguided = velocity(limited, state)
                image = estimate_sample(state, limited, unguided)
            score = self.score(image)
            if score.shape != (len(state),):
                raise ValueError(
                    f"`score` gave the shape {tuple(score.shape)}, expected ({len(state)},): one number for each image."
                )
            (gradient,) = torch.autograd.grad(score.sum(), state)
        if self.at == "state" or limited != sigma:
            with torch.no_grad():
                unguided = velocity(sigma, state)
        # A limit that rounds to 1 leaves an infinite quotient, which `clamp` handles.
        weight = (limited / (1 - limited)).clamp(max=self.largest_weight)
        return unguided.detach() - self.scale * weight * gradient
