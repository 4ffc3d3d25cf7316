"""ODE solvers that integrate a velocity function from noise to data and count its evaluations.

The integrators are torchdiffeq's; the grid is the scheduler's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchdiffeq import odeint

from ..utils.checks import check_choice


# Our names -> torchdiffeq's: in diffusers "heun" is the trapezoidal rule of order 2, torchdiffeq's "heun2".
_FIXED_STEP = {"euler": "euler", "heun": "heun2", "rk4": "rk4"}
SOLVERS = (*_FIXED_STEP, "dopri5")
# Per step.
_EVALUATIONS = {"euler": 1, "heun": 2, "rk4": 4}
# Per image with "dopri5" at a tolerance of 1e-5. It depends on what was learned: 280 +- 46 on digits [ours].
DOPRI5_EVALUATIONS = 280


@dataclass
class SolverOutput:
    """The state at the last sigma, of the shape of the noise, and the number of function evaluations."""

    sample: torch.Tensor
    nfe: int


def expected_evaluations(solver: str, num_inference_steps: int) -> int:
    """Evaluations of the U-Net per image; for "dopri5", which chooses its steps, the number measured on digits."""
    return num_inference_steps * _EVALUATIONS[solver] if solver in _EVALUATIONS else DOPRI5_EVALUATIONS


def solve(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    solver: str = "heun",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    on_step: Callable[[], None] | None = None,
) -> SolverOutput:
    """Integrate dx/dsigma = velocity(sigma, x) from the first sigma to the last.

    Args:
        velocity: function of a scalar sigma and a state `(batch, ...)` that returns a tensor of the state's shape.
        noise: the state at `sigmas[0]`, `(batch, ...)`.
        sigmas: `(steps + 1,)`, falling, as in `FlowMatchEulerDiscreteScheduler.sigmas`. "euler" (1 evaluation per
            step), "heun" (2) and "rk4" (4, the 3/8 rule) step from each to the next; "dopri5" (Dormand-Prince) uses
            only the first and the last and chooses its own steps.
        rtol, atol: tolerances of "dopri5". Its error is a norm over the whole batch, so a sample depends, within the tolerance,
            on those beside it.
        on_step: called before each step, for progress bars.

    Raises:
        ValueError: unknown solver, a tolerance that is not above 0, sigmas that do not fall, or "dopri5" gave up.

    Source: arXiv 2510.02631, sampling: dopri5 and rk4 [text], tolerance and other solvers [ours].
    """
    check_choice("solver", solver, SOLVERS)
    if sigmas.dim() != 1 or len(sigmas) < 2 or (sigmas.diff() >= 0).any():
        raise ValueError(f"`sigmas` is {sigmas.tolist()}, expected a falling sequence of at least two.")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not 0 < tolerance < math.inf:
            raise ValueError(f"`{name}` is {tolerance}, expected a number above 0.")
    counted = _Counted(velocity, on_step)
    sigmas = sigmas.to(noise.device)
    if solver == "dopri5":
        try:
            states = odeint(counted, noise, sigmas[[0, -1]], rtol=rtol, atol=atol, method="dopri5")
        except AssertionError as error:
            raise ValueError(
                f"`solver` 'dopri5' gave up after {counted.evaluations} evaluations ({error}): the velocity is not finite or changes "
                "too fast. Check the model, raise `rtol` and `atol`, or use another solver."
            ) from error
    else:
        options = {"grid_constructor": lambda func, y0, t: sigmas.to(t)}
        states = odeint(counted, noise, sigmas[[0, -1]], method=_FIXED_STEP[solver], options=options)
    return SolverOutput(sample=states[-1], nfe=counted.evaluations)


class _Counted:
    """Wraps the velocity function for torchdiffeq and counts the calls."""

    def __init__(self, velocity: Callable, on_step: Callable[[], None] | None) -> None:
        self.velocity = velocity
        self.on_step = on_step
        self.evaluations = 0

    def __call__(self, sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        self.evaluations += 1
        return self.velocity(sigma, state)

    def callback_step(self, sigma: torch.Tensor, state: torch.Tensor, step: torch.Tensor) -> None:
        if self.on_step is not None:
            self.on_step()
