"""A learning rate for each kind of an adapter's parameters."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn


# Multiple of a run's learning rate for alpha, unless its arguments say another [ours: docs/results.md].
ALPHA_RATE = 10.0
_KINDS = {
    "alpha": r"\.funlora_(add_)?alpha\.",
    "omega": r"\.funlora_(add_)?omega\.",
    # Of FunLoRA, or a row of the embedding that PEFT trains.
    "class_vector": r"\.(funlora_class_vector|trainable_tokens_delta)\.",
}


def alpha_rate(peft_method: str | None, function: str | None, given: float | None = None) -> float | None:
    """Return the multiple of the learning rate for alpha that these arguments of a run come to; None: its adapters have no alpha."""
    if peft_method != "funlora" or function == "identity":
        return None
    return ALPHA_RATE if given is None else given


def kind_of(name: str) -> str | None:
    """Return "alpha", "omega" or "class_vector" for a parameter of this name in a PEFT model, or None for another."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), None)


def parameter_groups(
    model: nn.Module, lr: float, *, alpha: float = 1.0, omega: float = 1.0, class_vector: float = 1.0
) -> list[dict[str, Any]]:
    """Make the parameter groups of an optimizer, in which FunLoRA's alpha, omega and class vector have rates of their own.

    Args:
        model: a PEFT model; its parameters with a gradient are taken.
        lr: rate of A, B and all others.
        alpha, omega, class_vector: multiples of `lr`, above 0.

    Returns:
        A group for each rate, with "params" and "lr".

    Raises:
        ValueError: a multiple that is not finite and above 0, or other than 1 for what no trained parameter is.

    Source: [ours]; LoRA+ (arXiv 2402.12354) has such a multiple for B.

    Example:
        ```py
        >>> optimizer = torch.optim.Adam(parameter_groups(model, lr=3e-2, alpha=10))
        ```
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    multiples = {"alpha": alpha, "omega": omega, "class_vector": class_vector}
    for kind, multiple in multiples.items():
        if not 0 < multiple < math.inf:
            raise ValueError(f"`{kind}` is {multiple!r}, expected a finite number above 0.")
        if multiple != 1 and kind not in map(kind_of, trained):
            raise ValueError(f"`{kind}` is {multiple:g}, but no trained parameter is of this kind: leave it out.")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault(multiples.get(kind_of(name) or "", 1.0), []).append(parameter)
    return [{"params": parameters, "lr": lr * multiple} for multiple, parameters in groups.items()]
