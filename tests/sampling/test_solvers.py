from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.integrate import solve_ivp

from funlora_hf.sampling.solvers import solve


def sigmas(steps: int) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    return scheduler.sigmas


def velocity(sigma, x):
    return -2 * x * torch.cos(3 * sigma) + sigma


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def exact(noise) -> np.ndarray:
    flat = noise.numpy().reshape(-1)
    solution = solve_ivp(lambda s, x: -2 * x * np.cos(3 * s) + s, (1, 0), flat, rtol=1e-11, atol=1e-11)
    return solution.y[:, -1].reshape(noise.shape)


@pytest.mark.parametrize(
    ("solver", "evaluations", "order", "coarse"), [("euler", 1, 1, 40), ("heun", 2, 2, 40), ("rk4", 4, 4, 10)]
)
def test_fixed_steps_have_their_order_and_their_evaluations(solver, evaluations, order, coarse, noise, exact):
    errors = []
    for steps in (coarse, 2 * coarse):
        output = solve(velocity, noise, sigmas(steps), solver=solver)
        assert output.nfe == evaluations * steps
        errors.append(np.abs(output.sample.numpy() - exact).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_dopri5_meets_its_tolerance_and_counts(noise, exact):
    calls = 0

    def counted(sigma, x):
        nonlocal calls
        calls += 1
        return velocity(sigma, x)

    output = solve(counted, noise, sigmas(3), solver="dopri5", rtol=1e-8, atol=1e-8)
    assert np.abs(output.sample.numpy() - exact).max() < 1e-6
    assert output.nfe == calls > 7


def test_euler_is_the_stock_scheduler_s_step(noise):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    x = noise.float()
    for index, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(scheduler.sigmas[index], x), timestep, x).prev_sample
    torch.testing.assert_close(solve(velocity, noise.float(), scheduler.sigmas, solver="euler").sample, x)


def test_the_grid_is_the_scheduler_s_also_when_it_is_shifted(noise):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    met = []

    def remembering(sigma, x):
        met.append(float(sigma))
        return velocity(sigma, x)

    solve(remembering, noise, scheduler.sigmas, solver="euler")
    np.testing.assert_allclose(met, scheduler.sigmas[:-1].numpy(), rtol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "dopri5"])
def test_every_step_is_told(solver, noise):
    steps = []
    output = solve(velocity, noise, sigmas(6), solver=solver, on_step=lambda: steps.append(1))
    assert len(steps) == 6 if solver != "dopri5" else 0 < len(steps) <= output.nfe


def test_bad_input_is_named(noise):
    with pytest.raises(ValueError, match="`solver` is 'rk5', expected one of: 'euler', 'heun', 'rk4', 'dopri5'"):
        solve(velocity, noise, sigmas(2), solver="rk5")
    with pytest.raises(ValueError, match=r"`sigmas` is .* expected a falling sequence"):
        solve(velocity, noise, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("tolerance", [0.0, -1e-5, float("nan"), float("inf")])
def test_tolerances_are_above_0(name, tolerance, noise):
    with pytest.raises(ValueError, match=f"`{name}` is {tolerance}, expected a number above 0"):
        solve(velocity, noise, sigmas(2), solver="dopri5", **{name: tolerance})


@pytest.mark.parametrize("spoil", [lambda x: x * float("nan"), lambda x: 1e30 * x * x])
def test_a_solver_that_gives_up_says_so(spoil, noise):
    with pytest.raises(ValueError, match=r"`solver` 'dopri5' gave up after [0-9]+ evaluations"):
        solve(lambda sigma, x: spoil(x), noise, sigmas(2), solver="dopri5")
