"""Guided velocities against a closed form, and what must stay equal to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from funlora_hf.sampling.drawing import draw_samples
from funlora_hf.sampling.guidance import GUIDED_AT, Guidance, estimate_sample
from funlora_hf.sampling.solvers import solve


def test_the_gradient_goes_through_the_model():
    """v = x M, score = -|x1 - target|^2 / 2 with x1 = x (I - sigma M): the gradient is (target - x1) (I - sigma M)^T."""
    generator = torch.Generator().manual_seed(0)
    state, target = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    matrix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    sigma = torch.tensor(0.6, dtype=torch.float64)
    guidance = Guidance(lambda images: -(images - target).square().sum(dim=1) / 2, scale=0.3)
    guided = guidance(lambda sigma, x: x @ matrix, sigma, state)
    path = np.eye(3) - 0.6 * matrix.numpy()
    gradient = (target.numpy() - state.numpy() @ path) @ path.T
    expected = state.numpy() @ matrix.numpy() - 0.3 * (0.6 / 0.4) * gradient
    np.testing.assert_allclose(guided.numpy(), expected, rtol=1e-12)
    assert not guided.requires_grad


@pytest.mark.parametrize("strength", [0.5, 2.0])
@pytest.mark.parametrize("deviation", [1.0, 0.5])
def test_a_normal_distribution_moves_by_its_variance_times_a_linear_score(deviation, strength):
    """N(0, d^2) times exp(k x) is N(k d^2, d^2); the velocity of N(0, d^2) is known in closed form."""
    variance = deviation**2

    def velocity(sigma, x):
        return (sigma - (1 - sigma) * variance) / ((1 - sigma) ** 2 * variance + sigma**2) * x

    half = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The mean is 0 and the deviation 1, so that all that is left is the solver's error.
    noise = torch.cat([half, -half]) / half.square().mean().sqrt()
    guidance = Guidance(lambda images: strength * images.sum(dim=1), scale=1.0, largest_weight=10.0)
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)
    samples = solve(lambda sigma, x: guidance(velocity, sigma, x), noise, sigmas).sample
    assert samples.mean().item() == pytest.approx(strength * variance, rel=0.01)
    assert samples.std().item() == pytest.approx(deviation, rel=0.01)


@pytest.mark.parametrize("sigma", [0.3, 0.8, 0.95, 1.0])
def test_at_the_state_the_gradient_is_the_score_s_own(sigma):
    """Against finite differences of a classifier of the noisy image; no gradient goes through the model."""
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().requires_grad_(False)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, dtype=torch.float64)

    def velocity(sigma, x):
        assert not torch.is_grad_enabled()
        return weight * x.tanh() * sigma

    def score(images):
        return classifier(images).log_softmax(dim=1)[:, 1]

    sigma = torch.tensor(sigma, dtype=torch.float64)
    guided = Guidance(score, scale=0.7, largest_weight=5.0, at="state")(velocity, sigma, state)
    expected = torch.empty_like(state)
    for column in range(3):
        step = 1e-5 * torch.eye(3, dtype=torch.float64)[column]
        expected[:, column] = (score(state + step) - score(state - step)) / 2e-5
    factor = 0.7 * min(sigma.item() / (1 - sigma.item()), 5.0) if sigma < 1 else 0.7 * 5.0
    with torch.no_grad():
        np.testing.assert_allclose((velocity(sigma, state) - guided).numpy(), factor * expected.numpy(), rtol=1e-7)
    assert weight.grad is None


@pytest.mark.parametrize(("sigma", "weight"), [(1.0, 10.0), (0.95, 10.0), (0.5, 1.0), (0.0, 0.0)])
def test_the_weight_is_bounded(sigma, weight):
    state = torch.zeros(2, 3, dtype=torch.float64)
    guidance = Guidance(lambda images: images.sum(dim=1), scale=1.0)
    guided = guidance(lambda sigma, x: 0 * x, torch.tensor(sigma, dtype=torch.float64), state)
    np.testing.assert_allclose(guided.numpy(), -weight)


def test_the_estimate_of_a_straight_path_is_its_end():
    generator = torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor(0.3, dtype=torch.float64)
    state = (1 - sigma) * sample + sigma * noise
    torch.testing.assert_close(estimate_sample(state, sigma, noise - sample), sample)


@pytest.mark.parametrize("at", GUIDED_AT)
@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_guidance_of_scale_zero_samples_the_same_to_the_bit_and_more_moves(solver, at, tiny_pipe):
    def draw(guidance):
        settings = {"purpose": "test", "seed": 0, "batch_size": 3, "solver": solver, "num_inference_steps": 3}
        return draw_samples(tiny_pipe, 3, 5, tolerance=1e-2, guidance=guidance, **settings).images

    def brightness(images):
        return images.flatten(1).mean(dim=1)

    plain = draw(None)
    assert torch.equal(draw(Guidance(brightness, scale=0.0, at=at)), plain)
    brighter = draw(Guidance(brightness, scale=20.0, at=at))
    assert (brightness(brighter) > brightness(plain)).all()
    assert all(parameter.grad is None for parameter in tiny_pipe.unet.parameters())


@pytest.mark.parametrize("score", [torch.sum, lambda images: images, lambda images: images[:1].sum(dim=1)])
def test_a_score_that_is_not_one_number_for_each_image_is_refused(score):
    with pytest.raises(ValueError, match=r"`score` gave the shape \(.*\), expected \(2,\)"):
        Guidance(score, scale=1.0)(lambda sigma, x: 0 * x, torch.tensor(0.5), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", math.nan), ("scale", math.inf), *(("largest_weight", bad) for bad in (0.0, -1.0, math.inf, math.nan))],
)
def test_numbers_that_would_spoil_samples_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is {value}, expected a finite number"):
        Guidance(lambda images: images.flatten(1).sum(1), **{"scale": 1.0, field: value})


def test_an_unknown_place_of_the_score_is_refused():
    with pytest.raises(ValueError, match="`at` is 'noise', expected one of: 'estimate', 'state'"):
        Guidance(lambda images: images.flatten(1).sum(1), 1.0, at="noise")
