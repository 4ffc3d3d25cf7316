"""Copy the values of another adapter into an adapter of a model, without compiling again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from accelerate.utils import extract_model_from_parallel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..tuner_base.layer import AdapterLayer, adapter_layers
from ..tuner_base.weights import forget
from ..tuner_base.wrappers import without_peft
from ..utils.checks import listed
from ..utils.tensors import misnamed, misshapen, not_finite


SAVED_PREFIX = "base_model.model."
_COMPILED = "_orig_mod"


def hotswap_adapter(model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Copy the values of another adapter into an adapter that is in the model.

    The parameters stay the same objects, so that a compiled model needs one compilation for any number of classes;
    with `set_adapter`, torch compiles again for each class. If this raises, nothing has changed.

    Args:
        model (`torch.nn.Module`): a PeftModel, a tuner, or a module with adapter layers in it, also compiled or under DDP.
        state_dict (`Mapping[str, torch.Tensor]`): the other adapter as PEFT saves it: what `safetensors.torch.load_file` returns
            for its `adapter_model.safetensors`, or what `get_peft_model_state_dict` returns. It must have the same config; the
            tensors show only in part whether it does (`cosine` and `power` have the same shapes).
        adapter_name (`str`, *optional*, defaults to `"default"`): the adapter in the model whose values are replaced.

    Raises:
        ValueError: the model has no such adapter, the adapter is merged, or tensors are missing, unexpected, of another shape
            or not finite; the error names them.

    Source: [ours].
    """
    inner = wrapped_model(model)
    layers = adapter_layers(inner)
    known = sorted({name for layer in layers for name in layer.settings})
    if adapter_name not in known:
        raise ValueError(f"`adapter_name` is {adapter_name!r}, expected an adapter of the model: {known}.")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"Cannot hot-swap adapter {adapter_name!r} because it is currently merged into the base weights. Please "
            "unmerge the adapter first by calling `unmerge_adapter`."
        )
    live = dict(saved_tensors(inner, adapter_name))
    given = {plain_key(key): value for key, value in state_dict.items()}
    problems = [*misnamed(live, given), *misshapen(live, given), *not_finite(given)]
    if problems:
        raise ValueError(f"The tensors do not fit adapter {adapter_name!r}, nothing was changed:\n{listed(problems)}")
    for layer in layers:
        layer.stop_offloading_adapters()
    live = dict(saved_tensors(inner, adapter_name))
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(given[key])
    for layer in layers:
        forget(layer)


def wrapped_model(model: nn.Module) -> nn.Module:
    """Return the model that the adapters were added to, without its wrappers."""
    return without_peft(extract_model_from_parallel(model, keep_torch_compile=False))


def saved_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an adapter in the model, with the keys under which PEFT saves them, without PEFT's prefix."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            for part in module.adapter_layer_names:
                if adapter_name in getattr(module, part):
                    yield plain_key(f"{name}.{part}"), getattr(module, part)[adapter_name]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            tensors = module.state_dict()
            for saved, key in module.adapter_state_dict_load_map(adapter_name).items():
                yield plain_key(f"{name}.{saved}"), tensors[key]


def plain_key(key: str) -> str:
    """Return the key of a saved tensor without the prefixes of PEFT and `torch.compile`."""
    return ".".join(part for part in key.split(".") if part != _COMPILED).removeprefix(SAVED_PREFIX)
