"""Do these tensors fit that adapter: names, shapes, finite values. Knows tensors by name, nothing of layers or files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch


_LISTED = 10
# Characters of a line: names from a file may be of any length.
_LINE = 300


def misnamed(live: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """A line for every tensor of `live` that `given` lacks, and for every other one that it has."""
    missing = [
        f"{key}: missing, expected a tensor of shape {tuple(live[key].shape)}" for key in live.keys() - given.keys()
    ]
    unexpected = [
        f"{key}: found a tensor of shape {tuple(given[key].shape)}, expected none"
        for key in given.keys() - live.keys()
    ]
    return missing + unexpected


def misshapen(live: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """A line for every tensor that has another shape in `given` than in `live`."""
    return [
        f"{key}: found shape {tuple(given[key].shape)}, expected {tuple(live[key].shape)}"
        for key in live.keys() & given.keys()
        if live[key].shape != given[key].shape
    ]


def not_finite(given: Mapping[str, torch.Tensor]) -> list[str]:
    """A line for every tensor of `given` with NaN or infinity in it."""
    return [
        f"{key}: found NaN or infinity, expected finite values"
        for key, value in given.items()
        if not value.is_meta and not torch.isfinite(value).all()
    ]


def listed(problems: Iterable[str]) -> str:
    """The lines in order of their keys, each once and not more of them than can be read."""
    lines = [f"- {shortened(problem, _LINE)}" for problem in sorted(set(problems))]
    return "\n".join(lines if len(lines) <= _LISTED else [*lines[:_LISTED], f"- and {len(lines) - _LISTED} more"])


def shortened(text: str, length: int) -> str:
    """The text, its middle left out if it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def check_before_loading(
    live: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    saved_modules: Mapping[str, torch.Tensor],
) -> None:
    """
    Refuse tensors of adapters that `load_state_dict` would take in part; other shapes are left to torch.

    PEFT only warns of tensors that a file lacks, says nothing of those that the model lacks, and does not look at
    values.

    Args:
        live: all tensors of adapters that are there to be loaded, by a key that ends in the adapter's name.
        tensors: those about to be loaded.
        saved_modules: tensors of `modules_to_save` about to be loaded; the names of these PEFT checks itself.

    Raises:
        ValueError: an adapter of which some tensors are given lacks others; a tensor that is not in `live`; a value
            that is not finite.
    """
    loaded = {_adapter_of(key) for key in tensors if key in live}
    wanted = {key: value for key, value in live.items() if _adapter_of(key) in loaded}
    problems = [*misnamed(wanted, tensors), *not_finite(tensors), *not_finite(saved_modules)]
    if problems:
        raise ValueError(
            f"The tensors do not fit the adapters of this model, nothing was loaded:\n{listed(problems)}\n"
            "Load them with the config that they were saved with, into the model that they were trained for. If the "
            "adapter is in the model by now, call `delete_adapter` before another attempt."
        )


def _adapter_of(key: str) -> str:
    return key.rpartition(".")[2]
