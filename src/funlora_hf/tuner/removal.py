"""Takes adapters off a model, whichever PEFT method put them there, and unwraps what has none left."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .save_guard import release_saving


def remove_adapters(model: nn.Module, names: Collection[str]) -> None:
    """Take adapters off a model, whether they were put in wholly or in part.

    Modules that no adapter is left in are the base's own again.

    Args:
        model: whose modules PEFT has wrapped in place.
        names: of adapters; those that are not there are ignored.
    """
    for path, module in adapted_modules(model).items():
        for name in names:
            if name in module._get_available_adapters():
                _delete_adapter(module, name)
        if not module._get_available_adapters():
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, base_module(module))
    release_saving(model)
    if not hasattr(model, "peft_config"):
        return
    for name in names:
        model.peft_config.pop(name, None)
    if not adapted_modules(model):
        del model.peft_config


def adapted_modules(model: nn.Module) -> dict[str, BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """The modules that adapters have wrapped, by name; not what lies inside the wrappers."""
    found: dict[str, BaseTunerLayer | AuxiliaryTrainingWrapper] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if is_wrapper(module) and not inside:
            found[path] = module
    return found


def is_wrapper(module: nn.Module) -> bool:
    """Whether PEFT has put this module around one of the model's own."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def base_module(module: BaseTunerLayer | AuxiliaryTrainingWrapper) -> nn.Module:
    """What a wrapper of PEFT's has wrapped."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module


def _delete_adapter(module: BaseTunerLayer | AuxiliaryTrainingWrapper, name: str) -> None:
    with warnings.catch_warnings():
        # PEFT makes another adapter active, and says so.
        warnings.simplefilter("ignore", UserWarning)
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(name)
        else:
            module.delete_adapter(name, new_active_adapters=None)
