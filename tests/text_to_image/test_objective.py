"""The objective against the schedulers' own methods, and against diffusers' formula of min-SNR."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

from funlora_hf.text_to_image.objective import Objective


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "epsilon": DDPMScheduler(**BETAS),
    "epsilon of PNDM": PNDMScheduler(**BETAS, skip_prk_steps=True),
    "epsilon of Euler": EulerDiscreteScheduler(**BETAS),
    "v": DDIMScheduler(**BETAS, prediction_type="v_prediction"),
    "v with zero SNR": DDIMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def batch(objective, n=6):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(n, 4, 3, 3, generator=generator)
    times = objective.times(n, generator)
    return latents, objective.noise(latents.shape, generator), times


def truth(name, latents, noise, times):
    """Noisy latents and target, by the methods of a scheduler that is made for training."""
    if name == "flow":
        sigma = (times / 1000).reshape(-1, 1, 1, 1)
        return sigma * noise + (1 - sigma) * latents, noise - latents
    zero = name == "v with zero SNR"
    ddpm = DDPMScheduler(**BETAS, rescale_betas_zero_snr=zero)
    noisy = ddpm.add_noise(latents, noise, times)
    return noisy, noise if name.startswith("epsilon") else ddpm.get_velocity(latents, noise, times)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noisy_latents_and_target_are_the_schedulers(name):
    objective = Objective(SCHEDULERS[name])
    latents, noise, times = batch(objective)
    noisy, target = truth(name, latents, noise, times)
    assert torch.equal(objective.noisy(latents, noise, times), noisy)
    assert torch.equal(objective.losses(target, latents, noise, times), torch.zeros(6))
    wrong = target + torch.arange(6.0).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(objective.losses(wrong, latents, noise, times), torch.arange(6.0) ** 2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_losses_do_not_depend_on_the_batch(name):
    objective = Objective(SCHEDULERS[name], snr_gamma=None if name == "flow" else 5.0)
    latents, noise, times = batch(objective)
    prediction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    losses = objective.losses(prediction, latents, noise, times)
    assert losses.shape == (6,)
    assert torch.equal(objective.losses(prediction[order], latents[order], noise[order], times[order]), losses[order])
    assert torch.equal(objective.losses(prediction[:1], latents[:1], noise[:1], times[:1]), losses[:1])


def test_flow_times_are_those_of_the_scheduler():
    scheduler = SCHEDULERS["flow"]
    objective = Objective(scheduler)
    latents, noise, _ = batch(objective)
    times = scheduler.timesteps[torch.tensor([0, 10, 500, 700, 998, 999])]
    expected = scheduler.scale_noise(latents, times, noise)
    torch.testing.assert_close(objective.noisy(latents, noise, times), expected)
    drawn = objective.times(4000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    # Uniform before the shift: as many on both sides of the shifted middle.
    assert (drawn < scheduler.timesteps[500]).float().mean() == pytest.approx(0.5, abs=0.03)
    assert 0 <= drawn.min() < drawn.max() <= 1000


def test_a_dynamic_shift_is_left_out():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    drawn = Objective(scheduler).times(4000, torch.Generator().manual_seed(0))
    assert drawn.mean() == pytest.approx(500, abs=20)


def test_logit_normal_times_are_in_the_middle():
    plain, normal = (
        Objective(FlowMatchEulerDiscreteScheduler(), timestep_density=density).times(
            4000, torch.Generator().manual_seed(0)
        )
        for density in ("uniform", "logit_normal")
    )
    assert normal.std() < 0.8 * plain.std()


def test_stratified_times_of_a_schedule_are_one_in_each_part_of_it():
    times = Objective(SCHEDULERS["epsilon"], timestep_density="stratified").times(20, torch.Generator().manual_seed(0))
    assert times.dtype == torch.int64
    assert sorted((times // 50).tolist()) == list(range(20))
    assert times.tolist() != sorted(times.tolist())


@pytest.mark.parametrize("name", ["epsilon", "v", "v with zero SNR"])
def test_min_snr_is_diffusers(name):
    """As in `train_text_to_image.py`."""
    objective, plain = Objective(SCHEDULERS[name], snr_gamma=5.0), Objective(SCHEDULERS[name])
    latents, noise, _ = batch(objective)
    times = torch.tensor([0, 50, 200, 600, 998, 999])
    prediction = torch.zeros_like(latents)
    snr = compute_snr(DDPMScheduler(**BETAS, rescale_betas_zero_snr="zero" in name), times)
    weights = torch.stack([snr, 5.0 * torch.ones_like(times)], dim=1).min(dim=1)[0]
    weights = weights / snr if name == "epsilon" else weights / (snr + 1)
    expected = plain.losses(prediction, latents, noise, times) * weights
    torch.testing.assert_close(objective.losses(prediction, latents, noise, times), expected)


def test_min_snr_of_noise_is_finite_at_an_snr_of_zero():
    objective = Objective(DDPMScheduler(**BETAS, rescale_betas_zero_snr=True), snr_gamma=5.0)
    ones = torch.ones(1, 4, 3, 3)
    assert objective.losses(0 * ones, ones, ones, torch.tensor([999])).tolist() == [1.0]


def test_noise_offset_is_constant_over_a_channel():
    objective, plain = (Objective(SCHEDULERS["epsilon"], noise_offset=offset) for offset in (0.5, 0.0))
    with_offset, without = (one.noise((2, 4, 3, 3), torch.Generator().manual_seed(0)) for one in (objective, plain))
    added = (with_offset - without).flatten(2)
    assert torch.allclose(added, added[:, :, :1].expand_as(added), atol=1e-6)
    assert added.std() > 0.2


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (DDPMScheduler(prediction_type="sample"), {}, "DDPMScheduler of the pipeline has prediction_type 'sample'"),
        (EDMEulerScheduler(), {}, "EDMEulerScheduler .* expected .* `beta_schedule`"),
        (SCHEDULERS["flow"], {"snr_gamma": 5.0}, "`snr_gamma` is 5.0, expected None"),
        (SCHEDULERS["v"], {"snr_gamma": 0.0}, "`snr_gamma` is 0.0, expected a number > 0"),
        (
            SCHEDULERS["v"],
            {"timestep_density": "logit_normal"},
            "`timestep_density` is 'logit_normal', expected 'uniform' or 'stratified'",
        ),
        (SCHEDULERS["flow"], {"timestep_density": "normal"}, "`timestep_density` is 'normal', expected one of"),
        (SCHEDULERS["v"], {"noise_offset": -0.1}, "`noise_offset` is -0.1"),
    ],
)
def test_what_does_not_apply_is_refused(scheduler, options, message):
    with pytest.raises(ValueError, match=message):
        Objective(scheduler, **options)


def test_a_prediction_of_another_shape_is_refused():
    objective = Objective(SCHEDULERS["v"])
    latents, noise, times = batch(objective)
    with pytest.raises(ValueError, match="shape"):
        objective.losses(torch.zeros(6, 8, 3, 3), latents, noise, times)
