"""Select the layers to adapt, count their parameters, and measure which layers mattered."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .tuner import FunLoraConfig
from .tuner.hotswap import SAVED_PREFIX
from .tuner.layer import FunLoraFactorLayer
from .tuner.learning_rates import kind_of
from .tuner.targets import (
    attentions,
    conv_names,
    decoder,
    decoder_middle,
    knows_order,
    linear_names,
    projection_names,
    unet_conv_names,
)
from .tuner_base.meta_shapes import adapted_shape
from .tuner_base.wrappers import evaluation_mode, plain_modules, without_peft
from .utils.files import read_tensors


_Adapter = Path | str | Mapping[str, torch.Tensor]
_RANGE = re.compile(r"(\d+)-(\d+)")
_BUDGET = re.compile(r"<=\s*(\d+(?:\.\d+)?)\s*([kK]?)(?:\s*per class)?")
_NAMED = ("all", "decoder", "decoder-middle", "attention", "cross-attention")


class LayerImportance(NamedTuple):
    """Importance of one layer over the classes.

    Args:
        mean: mean over the classes, >= 0.
        std: standard deviation over the classes (of the population, so 0 for one class).
    """

    mean: float
    std: float


class ParametersPerClass(NamedTuple):
    """Parameters of one adapter, the paper's "PPC".

    Args:
        without_vector: count without the class vector, as in the paper.
        with_vector: count of all parameters.
    """

    without_vector: int
    with_vector: int


def conv_layers(model: nn.Module, example_inputs: Any = None) -> list[str]:
    """Return the names of all Conv2d in order of execution: on the paper's backbone, the paper's numbering.

    For a `UNet2DModel` or a `UNet2DConditionModel` the order is known and the model does not run. Any other model (and
    these, if example inputs are given) runs once, in evaluation mode and without gradients. Then a convolution that runs
    twice has the place of its first call, and a convolution that does not run is left out.

    Args:
        model: a model with or without adapters of PEFT; the returned names are the names without adapters.
        example_inputs: arguments of one forward: a tuple, a dict of keyword arguments, or a single tensor.

    Returns:
        Names for `target_modules`.

    Raises:
        ValueError: the order is not known and there are no example inputs.

    Source: Table I [exact].
    """
    if example_inputs is not None:
        return _traced_conv_names(model, example_inputs)
    if knows_order(model):
        return unet_conv_names(model)
    raise ValueError(
        "`example_inputs` is None, but the order of execution is known only for a UNet2DModel or UNet2DConditionModel in "
        f"its standard form, and the model is a {type(without_peft(model)).__name__}. Pass the arguments of one forward, "
        "as a tuple or a dict."
    )


def select_layers(
    model: nn.Module,
    preset: str = "decoder-middle",
    *,
    example_inputs: Any = None,
    importance: Mapping[str, float | tuple[float, float]] | None = None,
    config: PeftConfig | None = None,
) -> list[str]:
    """Return the names of the layers to adapt, for `target_modules`.

    | preset            | layers                                                                                  |
    |-------------------|-----------------------------------------------------------------------------------------|
    | "all"             | every Conv2d                                                                              |
    | "decoder"         | every Conv2d in the up blocks of a U-Net                                                  |
    | "decoder-middle"  | the paper's choice: 40-54 on its CIFAR backbone, 40-56 on its ImageNet-100 backbone;      |
    |                   | on other U-Nets the rule of `docs/method.md`                                              |
    | "40-54"           | every Conv2d whose index in `conv_layers` is in this range, both ends included            |
    | "attention"       | the projections (Linear) of all attentions of a diffusers model                           |
    | "cross-attention" | the projections of all attentions to a prompt (SD, SDXL, PixArt; SD3 and Flux have joint attention) |
    | "<= 5K per class" | as many layers as the budget allows, also Linear: see below. "K" is 1000, "per class" is optional |

    For a budget, layers are taken in falling order of importance; a layer that exceeds the rest of the budget is skipped,
    and less important layers that fit are taken. The class vector does not count. Layers of equal importance are taken in
    order of execution.

    Args:
        model: a model with or without adapters.
        preset: see above.
        example_inputs: see `conv_layers`.
        importance: for a budget: layer name -> importance, as a number or as `layer_importance` returns it. Layers
            without importance are not taken.
        config: for a budget: the configuration of an adapter, to count its parameters; its targets are ignored. None
            means `FunLoraConfig()`.

    Returns:
        At least one name: convolutions in order of execution, then Linear layers in the order of `named_modules`.

    Raises:
        ValueError: an unknown preset, indices or a part that the model does not have, a budget without importance or
            below the cost of every layer, or importance of layers that the model does not have.

    Source: "40-54" and its importance, arXiv 2510.02631, Tables I and V [exact]; the presets and the rule of the budget [ours].
    """
    if preset in ("decoder", "decoder-middle"):
        if not knows_order(model):
            raise ValueError(
                f"`preset` is {preset!r}, a part of a UNet2DModel or UNet2DConditionModel in its standard form, but the "
                f"model is a {type(without_peft(model)).__name__}. Give a range of indices of `conv_layers`, or 'attention'."
            )
        return decoder(model) if preset == "decoder" else decoder_middle(model)
    if preset in ("attention", "cross-attention"):
        return _of_attentions(model, preset)
    if not is_preset(preset):
        raise ValueError(
            f"`preset` is {preset!r}, expected one of: {', '.join(_NAMED)}, a range like '40-54', a budget like '<= 5K per class'."
        )
    if budget := _BUDGET.fullmatch(preset):
        layers = linear_names(model)
        if not set(importance or ()) <= set(layers):
            layers = conv_layers(model, example_inputs) + layers
        return _fill_budget(model, layers, budget, importance, config or FunLoraConfig())
    layers = conv_layers(model, example_inputs)
    if not layers:
        raise ValueError(f"`preset` is {preset!r}, but {type(without_peft(model)).__name__} has no Conv2d that runs.")
    if span := _RANGE.fullmatch(preset):
        first, last = (int(number) for number in span.groups())
        if not first <= last < len(layers):
            raise ValueError(
                f"`preset` is {preset!r}, expected two rising indices between 0 and {len(layers) - 1}: the model has "
                f"{len(layers)} convolutions."
            )
        return layers[first : last + 1]
    return layers


def _of_attentions(model: nn.Module, preset: str) -> list[str]:
    chosen = {
        path: attention
        for path, attention in attentions(model).items()
        if preset == "attention" or getattr(attention, "is_cross_attention", False)
    }
    if not chosen:
        raise ValueError(
            f"`preset` is {preset!r}, but {type(without_peft(model)).__name__} has no such attention of diffusers: choose another preset, "
            "or give names of modules."
        )
    return [f"{path}.{name}" for path, attention in chosen.items() for name in projection_names(attention)]


def is_preset(text: str) -> bool:
    """Whether `select_layers` knows this as a preset."""
    return text in _NAMED or bool(_RANGE.fullmatch(text) or _BUDGET.fullmatch(text))


def parameters_per_class(model: nn.Module, config: PeftConfig) -> ParametersPerClass:
    """Count the parameters that an adapter with this configuration would add to the model.

    They are counted on a copy without values: the model and the configuration do not change, and no weight is copied.

    Args:
        model: a model with or without adapters; existing adapters do not count.
        config: a `FunLoraConfig` or any other configuration of PEFT.

    Returns:
        The count without and with the class vector: FunLoRA's class vector, or the embedding's rows that
        `trainable_token_indices` names. Both counts are the same if the adapter has no class vector.

    Raises:
        ValueError: PEFT raises it for targets that the model does not have.

    Source: arXiv 2510.02631, Tables I, II, IV and V [exact].
    """
    trained = {name: p.numel() for name, p in adapted_shape(model, config).named_parameters() if p.requires_grad}
    vectors = sum(count for name, count in trained.items() if kind_of(name) == "class_vector")
    total = sum(trained.values())
    return ParametersPerClass(without_vector=total - vectors, with_vector=total)


def layer_importance(
    model_or_adapters: nn.Module | _Adapter | Iterable[_Adapter],
    *,
    order: Sequence[str] | None = None,
) -> dict[str, LayerImportance]:
    """Compute the importance of each adapted layer over the classes: how far its A and B have moved from their start.

    `I_y^l = (||vec(A) - 1||_1 + ||vec(B) - 1||_1) / (|vec(A)| + |vec(B)|)` for class y, where A and B started at 1;
    `I^l` is its mean over the classes. For r > 1, B starts at 1/r, which then replaces 1 [ours].

    Args:
        model_or_adapters: a model with FunLoRA layers (a PeftModel or any other), where every adapter counts as a
            class; or adapters, each a folder or a state dict as PEFT saves them.
        order: layer names in the order of the result; other adapted layers follow them. None: order of execution for a
            model whose order is known (see `conv_layers`), otherwise the order of the model or the adapters.

    Returns:
        Layer name -> mean and standard deviation over the classes that adapt it. Empty if no layer has factors.

    Raises:
        FileNotFoundError: a folder without an adapter.
        ValueError: factors that are not finite.

    Source: arXiv 2510.02631, equations 20 and 21 and Figure 3 [text]. The paper measures adapters with `identity` and `mul`. For
    other functions it is computed in the same way [ours], but its size is not comparable. For vanilla add (`identity` and `add`) it
    has no meaning, since A and B start at other values.
    """
    if isinstance(model_or_adapters, nn.Module):
        by_adapter: dict[str, dict[str, float]] = {}
        for layer, module in plain_modules(model_or_adapters):
            if isinstance(module, FunLoraFactorLayer):
                for adapter, A in module.funlora_A.items():
                    by_adapter.setdefault(adapter, {})[layer] = _moved(A, module.funlora_B[adapter])
        per_class = list(by_adapter.values())
        if order is None and knows_order(model_or_adapters):
            order = unet_conv_names(model_or_adapters)
    else:
        if isinstance(model_or_adapters, (str, os.PathLike, Mapping)):
            model_or_adapters = [model_or_adapters]
        per_class = [_saved_importance(adapter) for adapter in model_or_adapters]
    result = {}
    for layer in dict.fromkeys([*(order or ()), *(layer for importance in per_class for layer in importance)]):
        numbers = torch.tensor([of[layer] for of in per_class if layer in of], dtype=torch.float64)
        if not torch.isfinite(numbers).all():
            raise ValueError(
                f"Factors of the layer {layer!r} are not finite, so it has no importance: leave their adapter out."
            )
        if len(numbers):
            result[layer] = LayerImportance(numbers.mean().item(), numbers.std(correction=0).item())
    return result


def layers_of_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the layers of one adapter that have factors.

    Args:
        state_dict: an adapter's tensors as PEFT saves them.

    Returns:
        Layer name -> its tensors by their name without `funlora_`: "A" and "B" and, if it has them, "alpha", "omega"
        and the second set of "mul-add", whose names begin with "add_".
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        layer, found, name = key.removeprefix(SAVED_PREFIX).rpartition(".funlora_")
        if found:
            layers.setdefault(layer, {})[name] = tensor
    return {layer: tensors for layer, tensors in layers.items() if "A" in tensors}


def _moved(A: torch.Tensor, B: torch.Tensor) -> float:
    """Compute the mean absolute change of the entries of A `(C_out, r)` and B `(r, C_in)` since their start, >= 0."""
    starts = torch.ones_like(A), torch.full_like(B, 1 / A.shape[1])
    moved = [(now.detach().double() - start.double()).flatten() for now, start in zip((A, B), starts, strict=True)]
    return torch.cat(moved).abs().mean().item()


def _saved_importance(adapter: _Adapter) -> dict[str, float]:
    if not isinstance(adapter, Mapping):
        adapter = read_tensors(Path(adapter) / "adapter_model.safetensors", remedy="get it again from its source")
    layers = layers_of_state_dict(adapter)
    return {layer: _moved(tensors["A"], tensors["B"]) for layer, tensors in layers.items()}


def _traced_conv_names(model: nn.Module, example_inputs: Any) -> list[str]:
    kwargs = example_inputs if isinstance(example_inputs, Mapping) else {}
    args = () if isinstance(example_inputs, Mapping) else example_inputs
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        raise ValueError(
            f"`example_inputs` is a {type(args).__name__}, expected a tuple of arguments, a dict of keyword arguments, or "
            "a tensor."
        )
    convolutions = set(conv_names(model))
    ran: dict[str, None] = {}
    # Hooks on both the wrapper of a convolution and the convolution: the adapter decides which of them is called.
    handles = [
        module.register_forward_pre_hook(partial(lambda name, *_: ran.setdefault(name), name))
        for name, module in plain_modules(model)
        if name in convolutions
    ]
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return list(ran)


def _fill_budget(
    model: nn.Module,
    layers: Sequence[str],
    budget: re.Match[str],
    importance: Mapping[str, float | tuple[float, float]] | None,
    config: Any,
) -> list[str]:
    if not importance:
        raise ValueError(
            f"`importance` is {importance!r}, but the budget {budget[0]!r} is filled by importance: pass what "
            "`layer_importance` returns for trained adapters of this model."
        )
    unknown = [layer for layer in importance if layer not in layers]
    if unknown:
        raise ValueError(
            f"`importance` has {', '.join(unknown)}, which the model does not run as a Conv2d or have as a Linear: pass the importance "
            "of adapters of this model."
        )
    costs = {layer: 0 for layer in layers if layer in importance}
    config = copy.deepcopy(config)
    config.target_modules = set(costs)
    for name, module in plain_modules(adapted_shape(model, config)):
        if name in costs and isinstance(module, BaseTunerLayer):
            costs[name] = sum(p.numel() for p in module.parameters() if p.requires_grad)

    def value(layer: str) -> float:
        entry = importance[layer]
        number = entry[0] if isinstance(entry, tuple) else entry
        if not math.isfinite(number):
            raise ValueError(f"`importance` of {layer!r} is {number}, expected a finite number.")
        return number

    chosen, left = set(), float(budget[1]) * (1000 if budget[2] else 1)
    # sorted() is stable, also in reverse: layers of equal importance stay in order of execution.
    for layer in sorted(costs, key=value, reverse=True):
        if costs[layer] <= left:
            chosen.add(layer)
            left -= costs[layer]
    if not chosen:
        raise ValueError(
            f"`preset` is {budget[0]!r}, but the cheapest layer costs {min(costs.values())} parameters per class: raise the "
            "budget, or use a larger `ratio` in `config`."
        )
    return [layer for layer in layers if layer in chosen]
