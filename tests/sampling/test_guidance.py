"""Guided velocities against a closed form, and what must stay equal to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from funlora_hf.sampling.drawing import draw_samples
from funlora_hf.sampling.guidance import Guidance, estimate_sample


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


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_guidance_of_scale_zero_samples_the_same_to_the_bit_and_more_moves(solver, tiny_pipe):
    def draw(guidance):
        settings = {"purpose": "test", "seed": 0, "batch_size": 3, "solver": solver, "num_inference_steps": 3}
        return draw_samples(tiny_pipe, 3, 5, tolerance=1e-2, guidance=guidance, **settings).images

    def brightness(images):
        return images.flatten(1).mean(dim=1)

    plain = draw(None)
    assert torch.equal(draw(Guidance(brightness, scale=0.0)), plain)
    brighter = draw(Guidance(brightness, scale=20.0))
    assert (brightness(brighter) > brightness(plain)).all()
    assert all(parameter.grad is None for parameter in tiny_pipe.unet.parameters())


@pytest.mark.parametrize("score", [torch.sum, lambda images: images, lambda images: images[:1].sum(dim=1)])
def test_a_score_that_is_not_one_number_for_each_image_is_refused(score):
    with pytest.raises(ValueError, match=r"`score` gave the shape \(.*\), expected \(2,\)"):
        Guidance(score, scale=1.0)(lambda sigma, x: 0 * x, torch.tensor(0.5), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("field", "value"), [("scale", math.nan), ("scale", math.inf), ("most", 0.0), ("most", -1.0), ("most", math.inf)]
)
def test_numbers_that_would_spoil_samples_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is {value}, expected a finite number"):
        Guidance(lambda images: images.flatten(1).sum(1), **{"scale": 1.0, field: value})
