"""Flow matching: probability path, velocity target, loss, density of the training times.

As in diffusers' `FlowMatchEulerDiscreteScheduler`, sigma is 1 at the noise and 0 at the data. The paper's time is
`t = 1 - sigma`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .utils.checks import check_at_least_one, check_choice


NUM_TRAIN_TIMESTEPS = 1000
TIMESTEP_DENSITIES = ("uniform", "stratified", "logit_normal")
# For images rounded to [-1, 1] in 8 bits.
_TOLERANCE = 0.01
# Below, float32 has no digits of the noise left.
_SMALLEST_SIGMA = 1e-6


def sigma_to_timestep(sigma: torch.Tensor, *, check_range: bool = True) -> torch.Tensor:
    """Return the time for the model: `1000 * sigma`, always a float tensor.

    Args:
        sigma: any shape, in [0, 1], floating point.
        check_range: False: do not wait for a GPU to read the numbers of `sigma`.

    Returns:
        Same shape, in [0, 1000]. (A `UNet2DModel` would round a Python float to an integer.)

    Raises:
        ValueError: `sigma` of another type or out of range, such as a timestep.
    """
    _check_floating(sigma=sigma)
    if check_range:
        _check_range(sigma)
    return NUM_TRAIN_TIMESTEPS * sigma


def interpolate(
    sample: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, *, check_range: bool = True
) -> torch.Tensor:
    """Return a point on the straight path from data to noise, `x_sigma = (1 - sigma) * sample + sigma * noise`.

    Args:
        sample: data, `(batch, ...)`.
        noise: standard normal, same shape.
        sigma: `(batch,)`, in [0, 1].
        check_range: as for `sigma_to_timestep`.

    Returns:
        Same shape as `sample`.

    Raises:
        ValueError: tensors of other shapes, which would be broadcast, or of integers, or `sigma` out of range.

    Source: arXiv 2510.02631, conditional flow matching on straight lines [text].
    """
    _check_alike(sample=sample, noise=noise)
    _check_sigmas(sigma, sample, check_range=check_range)
    sigma = sigma.reshape(-1, *(1 for _ in sample.shape[1:]))
    return (1 - sigma) * sample + sigma * noise


def velocity_target(sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return dx/dsigma along the path: `noise - sample`, same shape. Errors and source: as for `interpolate`."""
    _check_alike(sample=sample, noise=noise)
    return noise - sample


def expected_velocity(
    noisy: torch.Tensor, sigma: torch.Tensor, images: torch.Tensor, *, check_range: bool = True
) -> torch.Tensor:
    """Return the mean of `velocity_target` over all images that a point may come from.

    `(noisy - sum_i w_i images_i) / sigma` with `w = softmax_i(-|noisy - (1 - sigma) images_i|^2 / (2 sigma^2))`: the expectation of
    `noise - sample` given `noisy`, where `sample` is each of `images` with the same probability.

    Args:
        noisy: points on the path, as of `interpolate`, `(batch, ...)`, any floating dtype; computed at least in float32.
        sigma: `(batch,)`, in [0, 1]; less than 1e-6 counts as 1e-6, where the nearest image has all the weight.
        images: `(n, ...)`, n at least 1, on the device of `noisy`.
        check_range: as for `sigma_to_timestep`.

    Returns:
        Same shape as `noisy`, finite, without a graph.

    Raises:
        ValueError: tensors of other shapes or of integers, no image, or `sigma` out of range.

    Source: arXiv 2302.00670 (stable target field), for diffusion and some of the images [text]; here for straight paths and all images [ours].
    """
    _check_floating(noisy=noisy, images=images)
    _check_sigmas(sigma, noisy, check_range=check_range)
    if not len(images) or images.shape[1:] != noisy.shape[1:]:
        expected = ", ".join(map(str, ("n", *noisy.shape[1:])))
        raise ValueError(
            f"`images` has the shape {tuple(images.shape)}, expected ({expected}): at least one image of the shape of a sample of `noisy`."
        )
    dtype = torch.promote_types(noisy.dtype, torch.float32)
    points, candidates = noisy.flatten(1).to(dtype), images.flatten(1).to(dtype)
    sigma = sigma.to(dtype).clamp(min=_SMALLEST_SIGMA)[:, None]
    with torch.no_grad(), torch.autocast(noisy.device.type, enabled=False):
        # The square is multiplied out, without |noisy|^2, which all images share. The rounding of these sums matters only between
        # images that are almost equal.
        norms = torch.linalg.vector_norm(candidates, dim=1).square()
        closeness = points @ candidates.T - (1 - sigma) / 2 * norms
        weights = (closeness * (1 - sigma) / sigma.square()).softmax(dim=1)
        return ((points - weights @ candidates) / sigma).reshape(noisy.shape)


def flow_matching_loss(model_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error of the velocity for every sample.

    Args:
        model_output: `(batch, ...)`, any floating dtype; compared at least in float32.
        target: same shape.

    Returns:
        `(batch,)`, not reduced over the batch, so that held-out losses and parts of a batch can weight it.

    Raises:
        ValueError: other shapes, which would be broadcast, or integers.

    Source: as `interpolate`.
    """
    _check_alike(model_output=model_output, target=target)
    dtype = torch.promote_types(model_output.dtype, torch.float32)
    return (model_output.to(dtype) - target.to(dtype)).square().flatten(1).mean(dim=1)


def sample_sigmas(
    batch_size: int, *, density: str = "uniform", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw training times.

    Args:
        batch_size: how many, at least 1.
        density: "uniform" on [0, 1); "stratified", the same with one number in each n-th of it, in random order; or
            "logit_normal": the sigmoid of a standard normal.
        generator: draws them on its device; None: torch's global generator, on the CPU.

    Returns:
        `(batch_size,)`, float32, in [0, 1].

    Raises:
        ValueError: unknown density, or a `batch_size` that is no positive integer.

    Source: "uniform" [text]; "stratified" [ours], which lowers the variance of the mean loss; "logit_normal" is that of Stable Diffusion 3 (arXiv 2403.03206).
    """
    check_at_least_one("batch_size", batch_size)
    check_choice("timestep_density", density, TIMESTEP_DENSITIES)
    device = None if generator is None else generator.device
    if density == "uniform":
        return torch.rand(batch_size, generator=generator, device=device)
    if density == "stratified":
        strata = torch.randperm(batch_size, generator=generator, device=device)
        return (strata + torch.rand(batch_size, generator=generator, device=device)) / batch_size
    return torch.sigmoid(torch.randn(batch_size, generator=generator, device=device))


def losses_at(
    unet: nn.Module,
    sample: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    class_labels: torch.Tensor | None,
    target: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the loss of a U-Net for every sample, with given noise and times.

    Args:
        unet: a `UNet2DModel`, maybe with adapters or wrapped for several processes.
        sample, noise, sigma: as for `interpolate`, on the device of `unet`.
        class_labels: rows of its class embedding, `(batch,)`, int64, on that device; None for a U-Net without classes.
        target: velocity to learn, of the shape of `sample`; None: `velocity_target`.

    Returns:
        `(batch,)`, with its graph for the backward pass.

    Source: as `interpolate`.
    """
    # Without the checks of ranges, which would wait for the GPU.
    noisy = interpolate(sample, noise, sigma, check_range=False)
    model_output = unet(noisy, sigma_to_timestep(sigma, check_range=False), class_labels, return_dict=False)[0]
    return flow_matching_loss(model_output, velocity_target(sample, noise) if target is None else target)


def training_loss(
    unet: nn.Module,
    images: torch.Tensor,
    class_labels: torch.Tensor | None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Compute the loss of a batch of images with random times and noise: call `backward` on it, then step the optimizer.

    Args:
        unet: a `UNet2DModel` or a `PeftModel` around one, maybe compiled or wrapped for several processes.
        images: `(batch, channels, height, width)`, floating point in [-1, 1], on the device of `unet`; converted to float32. (For
            lower precision, call this under `torch.autocast`.)
        class_labels: `(batch,)`, int64. To train a base: the row of each image's class in the class embedding. To train an
            adapter that has a class vector (`class_embedding`): any row, such as 0, since the vector replaces it. None for a
            U-Net without classes.
        generator: draws sigma, then noise, as the trainer does; on the CPU (equal draws for every device) or on the device of
            `images`. None: torch's global generator.

    Returns:
        A scalar, float32: the mean of `losses_at`.

    Raises:
        ValueError: images of another type, shape, size or range, or not finite; labels of another shape or type, or out of the
            range of the class embedding.

    Source: arXiv 2510.02631, conditional flow matching [text].

    Example:
        ```py
        >>> loss = training_loss(model, images, torch.zeros(len(images), dtype=torch.long))
        >>> loss.backward()
        ```
    """
    config = getattr(extract_model_from_parallel(unet, keep_torch_compile=False), "config", None)
    _check_images(images, config)
    if class_labels is not None:
        _check_labels(class_labels, len(images), config)
        class_labels = class_labels.to(images.device)
    sigma = sample_sigmas(len(images), generator=generator).to(images.device)
    noise = randn_tensor(images.shape, generator=generator, device=images.device, dtype=torch.float32)
    return losses_at(unet, images.float(), noise, sigma, class_labels).mean()


def _check_floating(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"`{name}` is of {kind}, expected a tensor of floating-point numbers.")


def _check_alike(**tensors: torch.Tensor) -> None:
    """Raise a ValueError unless two tensors, given by their names, have the same shape."""
    _check_floating(**tensors)
    (name, one), (other_name, other) = tensors.items()
    if one.shape != other.shape:
        raise ValueError(
            f"`{other_name}` has the shape {tuple(other.shape)}, expected {tuple(one.shape)}, that of `{name}`."
        )


def _check_sigmas(sigma: torch.Tensor, sample: torch.Tensor, *, check_range: bool) -> None:
    """Raise a ValueError unless there is a sigma for each sample of a batch, in [0, 1] if `check_range`."""
    _check_floating(sigma=sigma)
    if sigma.shape != sample.shape[:1]:
        raise ValueError(
            f"`sigma` has the shape {tuple(sigma.shape)}, expected {tuple(sample.shape[:1])}: a number for each sample of the batch."
        )
    if check_range:
        _check_range(sigma)


def _check_range(sigma: torch.Tensor) -> None:
    # In this form it also refuses NaN.
    if not ((sigma >= 0) & (sigma <= 1)).all():
        low, high = torch.stack(sigma.detach().aminmax()).tolist()
        raise ValueError(
            f"`sigma` has numbers from {low:g} to {high:g}, expected [0, 1], from the data to the noise: timesteps are 1000 * sigma."
        )


def _check_images(images: torch.Tensor, config: Any) -> None:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        raise ValueError(
            f"`images` are {getattr(images, 'dtype', type(images).__name__)}, expected a tensor of floating-point numbers "
            "in [-1, 1]: for 0 to 255, `images / 127.5 - 1`."
        )
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"`images` have the shape {tuple(images.shape)}, expected (batch, channels, height, width).")
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels not in (None, images.shape[1]) or (isinstance(size, int) and images.shape[2:] != (size, size)):
        raise ValueError(
            f"`images` have the shape {tuple(images.shape)}, expected (batch, {channels}, {size}, {size}), as the U-Net makes them: "
            "resize them; where channels are last, `images.permute(0, 3, 1, 2)`."
        )
    low, high = torch.stack(images.detach().aminmax()).tolist()
    # In this form it also refuses NaN.
    if not -1 - _TOLERANCE <= low <= high <= 1 + _TOLERANCE:
        raise ValueError(
            f"`images` have numbers from {low:g} to {high:g}, expected finite ones in [-1, 1]: for 0 to 255, "
            "`images / 127.5 - 1`; for 0 to 1, `2 * images - 1`."
        )
    if low >= 0:
        warnings.warn(
            "`images` have no number below 0, though black is -1: if they are in [0, 1], pass `2 * images - 1`.",
            stacklevel=3,
        )


def _check_labels(class_labels: torch.Tensor, batch: int, config: Any) -> None:
    if not isinstance(class_labels, torch.Tensor):
        raise ValueError(
            f"`class_labels` are a {type(class_labels).__name__}, expected a tensor of torch.int64: `torch.tensor(labels)`."
        )
    if class_labels.dtype != torch.int64 or class_labels.shape != (batch,):
        raise ValueError(
            f"`class_labels` are {class_labels.dtype} of shape {tuple(class_labels.shape)}, expected torch.int64 of shape "
            f"({batch},): a label for each image."
        )
    rows = getattr(config, "num_class_embeds", None)
    low, high = torch.stack(class_labels.aminmax()).tolist()
    if rows is not None and not 0 <= low <= high < rows:
        raise ValueError(
            f"`class_labels` are from {low} to {high}, expected rows of the U-Net's class embedding, 0 to {rows - 1}: a new class has "
            "none, and its adapter's class vector takes the place of any row: pass 0."
        )
