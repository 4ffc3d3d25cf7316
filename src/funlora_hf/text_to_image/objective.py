"""What the denoiser of a text-to-image pipeline learns to predict, by the pipeline's scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ..flow_matching import TIMESTEP_DENSITIES, flow_matching_loss, interpolate, sample_sigmas, velocity_target
from ..utils.checks import check_choice


_PREDICTIONS = ("epsilon", "v_prediction")


class Objective:
    """The loss of a denoiser for every sample: squared error of the noise, of v, or of the velocity of a flow.

    Args:
        scheduler: that of the pipeline. A `FlowMatch...` scheduler means a flow, with times shifted by its `shift` (not by a
            dynamic one, which depends on the size of the image). Any other is read for its betas and `prediction_type`.
        timestep_density: "uniform" or "stratified", or "logit_normal", for a flow only.
        snr_gamma: gamma of min-SNR weights, > 0; None: no weights. Not for a flow.
        noise_offset: weight of a further noise that is constant over each channel, >= 0.

    Raises:
        ValueError: a scheduler whose denoiser predicts something else, such as the sample, or a setting that does not apply.

    Source: diffusers' DreamBooth scripts [exact]; min-SNR is arXiv 2303.09556, noise offset as in diffusers' scripts.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        timestep_density: str = "uniform",
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        config, name = scheduler.config, type(scheduler).__name__
        self.is_flow = name.startswith("FlowMatch")
        check_choice("timestep_density", timestep_density, TIMESTEP_DENSITIES)
        if not 0 <= noise_offset < math.inf:
            raise ValueError(f"`noise_offset` is {noise_offset!r}, expected a number >= 0.")
        if snr_gamma is not None and not 0 < snr_gamma < math.inf:
            raise ValueError(f"`snr_gamma` is {snr_gamma!r}, expected a number > 0, such as 5, or None.")
        if self.is_flow and snr_gamma is not None:
            raise ValueError(
                f"`snr_gamma` is {snr_gamma!r}, expected None: {name} is a flow, which has no such weights."
            )
        if not self.is_flow and timestep_density == "logit_normal":
            raise ValueError(
                f"`timestep_density` is {timestep_density!r}, expected 'uniform' or 'stratified': {name} is no flow."
            )
        self.timestep_density, self.snr_gamma, self.noise_offset = timestep_density, snr_gamma, noise_offset
        self.num_train_timesteps: int = config.num_train_timesteps
        if self.is_flow:
            self._shift = 1.0 if config.get("use_dynamic_shifting") else config.shift
            return
        self.predicts = config.get("prediction_type")
        # Without betas of its own, those of DDPMScheduler would be taken.
        if self.predicts not in _PREDICTIONS or "beta_schedule" not in config:
            raise ValueError(
                f"The scheduler {name} of the pipeline has prediction_type {self.predicts!r}, expected "
                "'epsilon' or 'v_prediction' and a `beta_schedule`, or a flow (FlowMatchEulerDiscreteScheduler): take another model."
            )
        self._scheduler: Any = DDPMScheduler.from_config(config)

    def times(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw n times as the denoiser takes them: `(n,)`, int64 from 0, or for a flow float32, shifted as in sampling."""
        if not self.is_flow and self.timestep_density == "uniform":
            return torch.randint(self.num_train_timesteps, (n,), generator=generator, device=generator.device)
        sigma = sample_sigmas(n, density=self.timestep_density, generator=generator)
        if not self.is_flow:
            # A sigma that rounds to 1 belongs to the last time.
            return (self.num_train_timesteps * sigma).long().clamp(max=self.num_train_timesteps - 1)
        return self.num_train_timesteps * (self._shift * sigma / (1 + (self._shift - 1) * sigma))

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Draw noise of a shape `(n, c, h, w)`, float32, with its offset, on the generator's device."""
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
        if self.noise_offset:
            offset = torch.randn(*shape[:2], 1, 1, generator=generator, device=generator.device)
            noise = noise + self.noise_offset * offset
        return noise

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return what the denoiser sees at these times: the shape of `latents`, which is also that of `noise`."""
        if self.is_flow:
            return interpolate(latents, noise, times / self.num_train_timesteps, check_range=False)
        return self._scheduler.add_noise(latents, noise, times)

    def losses(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """Compute the mean squared error of a prediction for every sample, `(n,)`, at least float32; weighted if `snr_gamma` is given.

        Args:
            prediction: what the denoiser returns for `noisy(latents, noise, times)`, of the same shape.
            latents, noise: `(n, c, h, w)`.
            times: `(n,)`, on the same device.

        Raises:
            ValueError: other shapes, which would be broadcast.
        """
        if self.is_flow:
            return flow_matching_loss(prediction, velocity_target(latents, noise))
        is_noise = self.predicts == "epsilon"
        target = noise if is_noise else self._scheduler.get_velocity(latents, noise, times)
        losses = flow_matching_loss(prediction, target)
        if self.snr_gamma is None:
            return losses
        snr = compute_snr(self._scheduler, times)
        # min(snr, gamma) / snr, in a form that is 1 where a schedule ends with an SNR of 0.
        weights = (self.snr_gamma / snr).clamp(max=1) if is_noise else snr.clamp(max=self.snr_gamma) / (snr + 1)
        return losses * weights
