from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from funlora_hf.flow_matching import flow_matching_loss, interpolate, sample_sigmas, sigma_to_timestep, velocity_target


def test_the_path_is_that_of_the_stock_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    sample, noise = torch.randn(2, 4, 3, 5, 5)
    expected = scheduler.scale_noise(sample, scheduler.timesteps, noise)
    torch.testing.assert_close(interpolate(sample, noise, scheduler.sigmas[:-1]), expected)


def test_the_target_is_the_derivative_of_the_path():
    sample, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    sigma, step = torch.rand(4, dtype=torch.float64), 1e-6
    difference = interpolate(sample, noise, sigma + step) - interpolate(sample, noise, sigma)
    torch.testing.assert_close(difference / step, velocity_target(sample, noise), atol=1e-6, rtol=1e-6)


def test_one_euler_step_along_the_target_reaches_the_data():
    sample, noise = torch.randn(2, 4, 1, 3, 3)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0])
    reached = scheduler.step(velocity_target(sample, noise), scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(reached, sample)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_a_mean_squared_error_of_each_sample(dtype):
    output, target = torch.randn(3, 2, 4, 4).to(dtype), torch.randn(3, 2, 4, 4).to(dtype)
    expected = ((output.double().numpy() - target.double().numpy()) ** 2).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(flow_matching_loss(output, target).double().numpy(), expected, rtol=1e-6)


def test_timesteps_are_floats_in_the_scheduler_s_range():
    timestep = sigma_to_timestep(torch.tensor([0.0, 0.0005, 1.0]))
    assert timestep.is_floating_point()
    assert timestep.tolist() == [0.0, 0.5, 1000.0]


def test_uniform_times_are_uniform():
    sigmas = sample_sigmas(20_000, generator=torch.Generator().manual_seed(0))
    quantiles = torch.quantile(sigmas, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.02, rtol=0)


def test_logit_normal_times_have_standard_normal_logits():
    sigmas = sample_sigmas(20_000, density="logit_normal", generator=torch.Generator().manual_seed(0))
    logits = torch.log(sigmas / (1 - sigmas))
    assert abs(logits.mean()) < 0.03
    assert abs(logits.std() - 1) < 0.03


def test_an_unknown_density_is_named():
    with pytest.raises(ValueError, match="`timestep_density` is 'beta', expected one of: 'uniform', 'logit_normal'"):
        sample_sigmas(1, density="beta")
