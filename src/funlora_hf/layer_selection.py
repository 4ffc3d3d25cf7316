"""Which layers matter: importance of each adapted layer, from trained adapters. Knows adapters as files only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file


_PREFIX = "base_model.model."


def adapter_importance(state_dict: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How far each layer of one adapter has moved from the identity.

    `I_y^l = (||vec(A) - 1||_1 + ||vec(B) - 1||_1) / (|vec(A)| + |vec(B)|)`, where A and B started at 1.

    Args:
        state_dict: of an adapter with r = 1, as PEFT saves it.

    Returns:
        Layer name -> importance, >= 0.

    Source: arXiv 2510.02631, equation 20 [text]. The paper takes it from adapters with `identity` and `mul`; the figure of other
    functions is measured alike [ours] and is not comparable in size with it.
    """
    importance = {}
    for key, A in state_dict.items():
        if key.endswith(".funlora_A"):
            layer = key.removesuffix(".funlora_A")
            moved = torch.cat([A.flatten(), state_dict[f"{layer}.funlora_B"].flatten()]).double() - 1
            importance[layer.removeprefix(_PREFIX)] = moved.abs().mean().item()
    return importance


def layer_importance(adapters: Iterable[Path], order: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Importance of each layer over the classes.

    Args:
        adapters: folders of adapters that adapt the same layers.
        order: names of layers, which gives the order of the result; layers that no adapter has are left out.

    Returns:
        Layer name -> (mean, standard deviation over the classes).

    Source: arXiv 2510.02631, equation 21 and Figure 3 [text].
    """
    per_class = [adapter_importance(load_file(folder / "adapter_model.safetensors")) for folder in adapters]
    result = {}
    for layer in order:
        values = torch.tensor([importance[layer] for importance in per_class if layer in importance])
        if len(values):
            result[layer] = (values.mean().item(), values.std(correction=0).item())
    return result
