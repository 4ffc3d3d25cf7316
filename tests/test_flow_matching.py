from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis.strategies import integers
from peft import get_peft_model
from runs import make_tiny_unet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from funlora_hf import FunLoraConfig, FunLoraPipeline, save_adapter
from funlora_hf.continual.batches import PhaseBatches
from funlora_hf.continual.config import ContinualTrainingArguments
from funlora_hf.continual.strategy import Phase, PhaseSettings, velocity_losses
from funlora_hf.data import load_image_data
from funlora_hf.data.pixels import to_model_range
from funlora_hf.flow_matching import (
    expected_velocity,
    flow_matching_loss,
    interpolate,
    sample_sigmas,
    sigma_to_timestep,
    training_loss,
    velocity_target,
)
from funlora_hf.held_out import held_out_loss
from funlora_hf.utils.seeds import generator_for


@pytest.fixture(scope="module")
def digits():
    return load_image_data("digits", image_size=8, channels=1)


def batch(size=4):
    return torch.rand(size, 1, 8, 8) * 2 - 1, torch.arange(size) % 2


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


def posterior_mean(noisy, sigma, images):
    """`expected_velocity` of one point, image by image, from the density of the noise that leads from it to the point."""
    noises = [(noisy - (1 - sigma) * image) / sigma for image in images]
    logs = [-(noise**2).sum() / 2 for noise in noises]
    weights = [np.exp(log - max(logs)) for log in logs]
    return sum(w * (noise - image) for w, noise, image in zip(weights, noises, images, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_the_expected_velocity_is_the_mean_over_the_images(dtype, tolerance):
    images, sigma = torch.randn(7, 2, 3, 3).to(dtype), torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99, 1.0]).to(dtype)
    noisy = interpolate(images[:6], torch.randn(6, 2, 3, 3).to(dtype), sigma)
    found = expected_velocity(noisy, sigma, images)
    points = zip(noisy.double().numpy(), sigma.double().numpy(), strict=True)
    expected = np.stack([posterior_mean(*point, images.double().numpy()) for point in points])
    np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance)
    # Each point by itself, whatever else is in the batch.
    torch.testing.assert_close(expected_velocity(noisy[1:2], sigma[1:2], images), found[1:2])
    assert expected_velocity(noisy[:0], sigma[:0], images).shape == (0, 2, 3, 3)


def draws(images, count):
    """Independent rows, sigmas and noise for some images, in float64."""
    generator = torch.Generator().manual_seed(0)
    sample = images[torch.randint(len(images), (count,), generator=generator)]
    sigma = torch.rand(count, generator=generator, dtype=torch.float64)
    return sample, sigma, torch.randn(sample.shape, generator=generator, dtype=torch.float64)


def test_the_expected_velocity_is_the_mean_of_draws_that_come_to_the_same_point():
    """What the target of a draw adds to it is zero on average in each part of the plane of points and times."""
    images = torch.tensor([-1.0, 0.0, 0.1, 1.0], dtype=torch.float64)[:, None]
    sample, sigma, noise = draws(images, 200_000)
    noisy = interpolate(sample, noise, sigma)
    rest = (velocity_target(sample, noise) - expected_velocity(noisy, sigma, images))[:, 0]
    parts = (noisy[:, 0].clamp(-2, 1.99) * 2).floor() * 10 + (sigma * 10).floor()
    # Where one image has nearly all the weight, too few draws come from others.
    found = [inside for part in parts.unique() if len(inside := rest[parts == part]) > 500 and inside.std() > 0.1]
    assert len(found) > 50
    assert all(abs(inside.mean()) < 4.5 * inside.std() / len(inside) ** 0.5 for inside in found)


def test_the_expected_velocity_over_one_image_is_its_own_target():
    sample, noise, sigma = torch.randn(1, 1, 4, 4), torch.randn(5, 1, 4, 4), torch.linspace(0.02, 1, 5)
    sample = sample.expand_as(noise)
    found = expected_velocity(interpolate(sample, noise, sigma), sigma, sample[:1])
    torch.testing.assert_close(found, velocity_target(sample, noise), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_near_the_data_the_expected_velocity_is_the_sample_s_own(dtype):
    sample, noise = torch.randn(2, 8, 3, 8, 8).to(dtype)
    for value, tolerance in ((1e-2, 1e-4), (1e-4, 1e-2)):
        sigma = torch.full((8,), value, dtype=dtype)
        found = expected_velocity(interpolate(sample, noise, sigma), sigma, sample)
        torch.testing.assert_close(found, velocity_target(sample, noise), atol=tolerance, rtol=tolerance)
    for value in (0.0, 1e-30, 1e-7):
        sigma = torch.full((8,), value, dtype=dtype)
        assert expected_velocity(interpolate(sample, noise, sigma), sigma, sample).isfinite().all()


def test_the_expected_velocity_keeps_its_digits_under_autocast():
    sample, noise, sigma = torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4), torch.rand(4)
    noisy = interpolate(sample, noise, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        found = expected_velocity(noisy, sigma, sample)
    assert torch.equal(found, expected_velocity(noisy, sigma, sample))


def test_the_expected_velocity_has_the_same_mean_gradient_and_less_variance():
    """Of a linear model, in batches of 8."""
    images = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sample, sigma, noise = draws(images, 4000)
    noisy = interpolate(sample, noise, sigma)
    output = noisy @ torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(target):
        return (noisy[:, :, None] * (output - target)[:, None]).unflatten(0, (-1, 8)).mean(dim=1)

    plain = gradients(velocity_target(sample, noise))
    expected = gradients(expected_velocity(noisy, sigma, images))
    difference = plain - expected
    assert (difference.mean(dim=0).abs() < 4 * difference.std(dim=0) / len(difference) ** 0.5).all()
    assert expected.var(dim=0).sum() < 0.9 * plain.var(dim=0).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_a_mean_squared_error_of_each_sample(dtype):
    output, target = torch.randn(3, 2, 4, 4).to(dtype), torch.randn(3, 2, 4, 4).to(dtype)
    expected = ((output.double().numpy() - target.double().numpy()) ** 2).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(flow_matching_loss(output, target).double().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (3, 1, 4, 4), (3, 2, 4)])
def test_the_loss_of_two_shapes_is_refused(shape):
    """torch would repeat the smaller one."""
    with pytest.raises(ValueError, match=r"`target` has the shape \(.*\), expected \(3, 2, 4, 4\)"):
        flow_matching_loss(torch.zeros(3, 2, 4, 4), torch.zeros(shape))


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


@given(size=integers(1, 100), seed=integers(0, 99))
def test_stratified_times_are_one_in_each_part(size, seed):
    sigmas = sample_sigmas(size, density="stratified", generator=torch.Generator().manual_seed(seed))
    lows = torch.arange(size) / size
    assert torch.all((sigmas.sort().values - lows).clamp(0, 1 / size + 1e-6) == sigmas.sort().values - lows)


def test_stratified_times_are_uniform_at_every_place():
    draws = [sample_sigmas(4, density="stratified", generator=torch.Generator().manual_seed(s)) for s in range(4000)]
    quantiles = torch.stack(draws).quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9])[:, None].expand(3, 4), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda x, s: sample_sigmas(1, density="beta"),
            "`timestep_density` is 'beta', expected one of: 'uniform', 'stratified', 'log",
        ),
        (lambda x, s: sample_sigmas(0), "`batch_size` .* positive integer .* 0"),
        (lambda x, s: sigma_to_timestep(1000 * s), "`sigma` has numbers from 500 to 500, expected .* 1000"),
        (lambda x, s: sigma_to_timestep(s.long()), "`sigma` is of torch.int64, expected a tensor of floating"),
        (lambda x, s: sigma_to_timestep(0.5), "`sigma` is of float, expected a tensor"),
        (lambda x, s: interpolate(x, x, s * torch.nan), "`sigma` has numbers from nan to nan"),
        (lambda x, s: interpolate(x, x, s[:1]), r"`sigma` has the shape \(1,\), expected \(4,\)"),
        (
            lambda x, s: interpolate(x, x, s[:, None, None, None]),
            r"`sigma` has the shape \(4, 1, 1, 1\), expected \(4,\)",
        ),
        (lambda x, s: interpolate(x.byte(), x, s), "`sample` is of torch.uint8"),
        (lambda x, s: interpolate(x, x[:, :1], s), r"`noise` has the shape \(4, 1, 4, 4\), expected \(4, 3, 4, 4\)"),
        (
            lambda x, s: velocity_target(x, s),
            r"`noise` has the shape \(4,\), expected \(4, 3, 4, 4\), that of `sample`",
        ),
        (lambda x, s: velocity_target(x.byte(), x), "`sample` is of torch.uint8"),
        (lambda x, s: expected_velocity(x.byte(), s, x), "`noisy` is of torch.uint8"),
        (lambda x, s: expected_velocity(x, s, x.byte()), "`images` is of torch.uint8"),
        (lambda x, s: expected_velocity(x, s[:1], x), r"`sigma` has the shape \(1,\), expected \(4,\)"),
        (lambda x, s: expected_velocity(x, 1000 * s, x), "`sigma` has numbers from 500 to 500"),
        (
            lambda x, s: expected_velocity(x, s, x[:, :1]),
            r"`images` has the shape \(4, 1, 4, 4\), expected \(n, 3, 4, 4\): at least one",
        ),
        (lambda x, s: expected_velocity(x, s, x[:0]), r"`images` has the shape \(0, 3, 4, 4\)"),
        (lambda x, s: flow_matching_loss(x, s), r"`target` has the shape \(4,\), expected .* `model_output`"),
        (lambda x, s: flow_matching_loss(x, x.byte()), "`target` is of torch.uint8"),
    ],
)
def test_what_would_be_broadcast_or_rounded_is_refused(call, text):
    """Images as wide as the batch is long, where a wrong shape would go unnoticed."""
    with pytest.raises(ValueError, match=text):
        call(torch.rand(4, 3, 4, 4), torch.full((4,), 0.5))


class Affine(nn.Module):
    """In place of a U-Net, a velocity that NumPy can compute from what the model is given."""

    def forward(self, sample, timestep, class_labels, return_dict):
        assert not return_dict
        return (0.5 * sample + (timestep / 1000 + class_labels)[:, None, None, None],)


def test_the_training_loss_is_that_of_the_formula():
    images, labels = batch()
    loss = training_loss(Affine(), images, labels, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    sigma = torch.rand(4, generator=generator).numpy()[:, None, None, None]
    noise = torch.randn(images.shape, generator=generator).numpy()
    noisy = (1 - sigma) * images.numpy() + sigma * noise
    velocity = 0.5 * noisy + sigma + labels.numpy()[:, None, None, None]
    assert loss.shape == ()
    np.testing.assert_allclose(loss.item(), ((velocity - (noise - images.numpy())) ** 2).mean(), rtol=1e-5)


def test_the_training_loss_is_the_trainer_s_for_equal_draws(tiny_unet, digits):
    settings = PhaseSettings.of(ContinualTrainingArguments(base_batch_size=8), "base")
    phase = Phase("base", (0, 1), settings, independent=False)
    real = PhaseBatches(digits, phase, seed=5, timestep_density="uniform", random_flip=False).batch(3)
    expected = velocity_losses(tiny_unet, real, real.class_ids).sum() / 8
    generator = generator_for(5, "base", "batch", 3)
    assert training_loss(tiny_unet, real.sample, real.class_ids, generator) == expected


def test_wrapped_models_have_the_same_loss(tiny_unet, tmp_path):
    images, labels = batch()

    def loss(model):
        return training_loss(model, images, labels, torch.Generator().manual_seed(0))

    expected = loss(tiny_unet)
    # An adapter starts as the identity, and without a class vector of its own it takes the base's rows.
    model = get_peft_model(tiny_unet, FunLoraConfig())
    assert loss(model) == expected
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = loss(DistributedDataParallel(model))
        wrapped.backward()
        assert wrapped == expected
        with pytest.raises(ValueError, match="rows of the U-Net's class embedding, 0 to 1"):
            training_loss(DistributedDataParallel(model), images, labels + 10)
    finally:
        torch.distributed.destroy_process_group()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda x, y: ((x * 127 + 128).byte(), y),
            "`images` are torch.uint8, expected a tensor of floating-point numbers in",
        ),
        (lambda x, y: (x.numpy(), y), "`images` are float32, expected a tensor"),
        (lambda x, y: (x.permute(0, 2, 3, 1), y), r"expected \(batch, 1, 8, 8\), as the U-Net .*permute"),
        (lambda x, y: (x.repeat(1, 1, 2, 2), y), r"have the shape \(4, 1, 16, 16\), expected \(batch, 1, 8, 8\)"),
        (lambda x, y: (x, y.tolist()), "`class_labels` are a list, expected a tensor"),
        (lambda x, y: (x * 127.5 + 127.5, y), r"`images` have numbers from .* to 2\d\d.*`images / 127.5 - 1`"),
        (lambda x, y: (x * torch.nan, y), "`images` have numbers from nan to nan, expected finite ones"),
        (lambda x, y: (x[:, 0], y), r"`images` have the shape \(4, 8, 8\), expected \(batch, channels"),
        (lambda x, y: (x[:0], y[:0]), r"`images` have the shape \(0, 1, 8, 8\)"),
        (lambda x, y: (x, y[:3]), r"of shape \(3,\), expected torch.int64 of shape \(4,\)"),
        (lambda x, y: (x, y.float()), "`class_labels` are torch.float32"),
        (lambda x, y: (x, y + 10), "`class_labels` are from 10 to 11, expected rows .*, 0 to 1: .* pass 0"),
        (lambda x, y: (x, y - 1), "`class_labels` are from -1 to 0"),
    ],
)
def test_images_and_labels_that_cannot_be_meant_are_refused(tiny_unet, change, text):
    with pytest.raises(ValueError, match=text):
        training_loss(tiny_unet, *change(*batch()))


def test_images_without_a_dark_pixel_give_a_warning(tiny_unet):
    images, labels = batch()
    with pytest.warns(UserWarning, match="no number below 0.*pass `2 \\* images - 1`"):
        training_loss(tiny_unet, images.abs(), labels)


def test_a_plain_loop_teaches_a_class_if_the_timestep_is_1000_sigma(digits, tmp_path):
    images = to_model_range(digits.images(7))
    unet = make_tiny_unet()
    known = [to_model_range(digits.images(class_id)) for class_id in (0, 1)]
    fit(unet, torch.cat(known), torch.arange(2).repeat_interleave(torch.tensor([len(x) for x in known])), steps=150)
    base = unet.eval().state_dict()

    def held_out(timestep, steps):
        unet = make_tiny_unet()
        unet.load_state_dict(base)
        model = get_peft_model(unet, FunLoraConfig(class_embedding="class_embedding", class_label=7))
        fit(Retimed(model, timestep), images, torch.zeros(len(images), dtype=torch.long), steps=steps, lr=2e-2)
        save_adapter(model, tmp_path / "seven")
        pipe = FunLoraPipeline(model.unload(), FlowMatchEulerDiscreteScheduler())
        pipe.load_adapter(tmp_path / "seven")
        return held_out_loss(pipe, 7, digits.images(7, split="test"), num_sigmas=4, seed=0)

    before = held_out(lambda timestep: timestep, steps=0)
    right = held_out(lambda timestep: timestep, steps=60)
    wrong = held_out(lambda timestep: timestep / 1000, steps=60)
    assert right < 0.8 * before
    assert right < 0.95 * wrong


class Retimed(nn.Module):
    """A model that is given another timestep than the one it is called with."""

    def __init__(self, model, timestep):
        super().__init__()
        self.model, self.timestep = model, timestep

    def forward(self, sample, timestep, *args, **kwargs):
        return self.model(sample, self.timestep(timestep), *args, **kwargs)


def fit(model, images, labels, *, steps, lr=5e-3):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,), generator=generator)
        training_loss(model, images[chosen], labels[chosen], generator).backward()
        optimizer.step()
        optimizer.zero_grad()
