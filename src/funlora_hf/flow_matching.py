"""Flow matching: probability path, velocity target, loss, density of the training times.

Pure functions of tensors in the convention of diffusers' `FlowMatchEulerDiscreteScheduler`: sigma is 1 at the noise and
0 at the data. The paper's time is `t = 1 - sigma`.
"""

from __future__ import annotations

import torch

from .utils.checks import check_choice


NUM_TRAIN_TIMESTEPS = 1000
TIMESTEP_DENSITIES = ("uniform", "logit_normal")


def sigma_to_timestep(sigma: torch.Tensor) -> torch.Tensor:
    """The time as the model takes it: `1000 * sigma`, always a float tensor.

    Args:
        sigma: any shape, in [0, 1], floating point.

    Returns:
        Same shape, in [0, 1000]. (A `UNet2DModel` would round a Python float to an integer.)
    """
    return NUM_TRAIN_TIMESTEPS * sigma


def interpolate(sample: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The straight path from data to noise, `x_sigma = (1 - sigma) * sample + sigma * noise`.

    Args:
        sample: data, `(batch, ...)`.
        noise: standard normal, same shape.
        sigma: `(batch,)`, in [0, 1].

    Returns:
        Same shape as `sample`.

    Source: arXiv 2510.02631, conditional flow matching on straight lines [text].
    """
    sigma = sigma.reshape(-1, *(1 for _ in sample.shape[1:]))
    return (1 - sigma) * sample + sigma * noise


def velocity_target(sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """dx/dsigma along the path: `noise - sample`, of their shape. Source: as `interpolate`."""
    return noise - sample


def flow_matching_loss(model_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the velocity for every sample.

    Args:
        model_output: `(batch, ...)`, any floating dtype; compared in float32 at least.
        target: same shape.

    Returns:
        `(batch,)`, not reduced over the batch, so that held-out losses and parts of a batch can weight it.

    Source: as `interpolate`.
    """
    dtype = torch.promote_types(model_output.dtype, torch.float32)
    return (model_output.to(dtype) - target.to(dtype)).square().flatten(1).mean(dim=1)


def sample_sigmas(
    batch_size: int, *, density: str = "uniform", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Training times.

    Args:
        batch_size: how many.
        density: "uniform" on [0, 1), or "logit_normal": the sigmoid of a standard normal.
        generator: a CPU generator.

    Returns:
        `(batch_size,)`, float32 on the CPU, in [0, 1].

    Raises:
        ValueError: unknown density.

    Source: "uniform" [text]; "logit_normal" is that of Stable Diffusion 3 (arXiv 2403.03206).
    """
    check_choice("timestep_density", density, TIMESTEP_DENSITIES)
    if density == "uniform":
        return torch.rand(batch_size, generator=generator)
    return torch.sigmoid(torch.randn(batch_size, generator=generator))
