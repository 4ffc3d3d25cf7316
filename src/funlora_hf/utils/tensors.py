"""Check the names, shapes and values of tensors, and compute the rank of a matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .checks import listed


def misnamed(live: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """Return one line for each tensor that only `live` or only `given` has."""
    missing = [
        f"{key}: missing, expected a tensor of shape {tuple(live[key].shape)}" for key in live.keys() - given.keys()
    ]
    unexpected = [
        f"{key}: found a tensor of shape {tuple(given[key].shape)}, expected none"
        for key in given.keys() - live.keys()
    ]
    return missing + unexpected


def misshapen(live: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """Return one line for each tensor that has different shapes in `given` and in `live`."""
    return [
        f"{key}: found shape {tuple(given[key].shape)}, expected {tuple(live[key].shape)}"
        for key in live.keys() & given.keys()
        if live[key].shape != given[key].shape
    ]


def not_finite(given: Mapping[str, torch.Tensor]) -> list[str]:
    """Return one line for each tensor that contains NaN or infinity."""
    return [
        f"{key}: found NaN or infinity, expected finite values"
        for key, value in given.items()
        if not value.is_meta and not torch.isfinite(value).all()
    ]


def check_before_loading(
    live: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    saved_modules: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Refuse tensors of adapters that `load_state_dict` would load only in part. torch itself refuses wrong shapes.

    PEFT only warns about missing tensors, ignores unexpected ones, and does not check values.

    Args:
        live: all tensors of adapters in the model, by a key that ends in the adapter's name.
        tensors: the tensors to load.
        saved_modules: tensors of `modules_to_save` to load; PEFT checks their names itself.

    Raises:
        ValueError: some tensors of an adapter are missing, a tensor is not in `live`, or a value is not finite.
    """
    loaded = {key.rpartition(".")[2] for key in tensors if key in live}
    wanted = {key: value for key, value in live.items() if key.rpartition(".")[2] in loaded}
    problems = [*misnamed(wanted, tensors), *not_finite(tensors), *not_finite(saved_modules or {})]
    if problems:
        raise ValueError(
            f"The tensors do not fit the adapters of this model, nothing was loaded:\n{listed(problems)}\n"
            "Load them with the config that they were saved with, into the model that they were trained for. If the "
            "adapter is already in the model, call `delete_adapter` before you try again."
        )


def numerical_rank(F: torch.Tensor, tol: float | None = None) -> int:
    """Count the singular values of a matrix above a tolerance, in float64 on the CPU.

    Args:
        F: `(m, n)`, with a floating dtype, finite.
        tol: absolute, >= 0. None means `max(m, n) * eps * sigma_max` with the machine epsilon of F's dtype, as in NumPy
            and torch. If you cast a float32 F to float64 first, its rounding errors count as rank.

    Returns:
        The rank, between 0 and min(m, n).

    Raises:
        ValueError: not a finite floating matrix, or a negative tolerance.

    Source: arXiv 2510.02631, Figure 4 [text]; the paper does not give its tolerance, so this one is [ours].
    """
    if F.dim() != 2 or not F.is_floating_point():
        raise ValueError(
            f"`F` is {F.dtype} of shape {tuple(F.shape)}, expected a floating matrix: pass what `functional_matrix` returns."
        )
    if tol is not None and not tol >= 0:
        raise ValueError(f"`tol` is {tol!r}, expected a number >= 0, or None for the tolerance of F's dtype.")
    if not torch.isfinite(F).all():
        raise ValueError(
            "`F` has entries that are not finite, so it has no rank: check the adapter that it belongs to."
        )
    relative = max(F.shape) * torch.finfo(F.dtype).eps if tol is None else 0.0
    # Not every device has float64.
    matrix = F.detach().to("cpu", torch.float64)
    return int(torch.linalg.matrix_rank(matrix, atol=tol or 0.0, rtol=relative))
