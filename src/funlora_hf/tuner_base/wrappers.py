"""Find a model's own modules inside PEFT's wrappers, and remove adapters."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def without_peft(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel or a tuner; its layers keep their adapters."""
    while isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        model = model.model if isinstance(model, BaseTuner) else model.base_model
    return model


def uncompiled(module: Any) -> Any:
    """Return the module that `torch.compile` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules like `named_modules`, but with the names that they have without adapters.

    A layer with adapters is yielded several times under its name: the wrapper, the wrapped module, and its copies in
    `modules_to_save`. Modules of adapters, such as LoRA's factors, are left out.
    """
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield name, module
        if isinstance(module, BaseTunerLayer):
            yield from walk(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            for version in (module.original_module, *getattr(module, "modules_to_save", {}).values()):
                yield from walk(name, version)
        else:
            for child_name, child in module.named_children():
                yield from walk(f"{name}.{child_name}" if name else child_name, child)

    return walk("", without_peft(model))


def remove_adapters(model: nn.Module, names: Collection[str], *, keep_configs: bool = False) -> None:
    """Remove adapters from a model, even if they were added only in part; unknown names are ignored.

    The base's module replaces a wrapper without adapters. With `keep_configs`, `model.peft_config` does not change.
    """
    for path, module in adapted_modules(model).items():
        with warnings.catch_warnings():
            # PEFT warns that it activates another adapter.
            warnings.simplefilter("ignore", UserWarning)
            for name in names:
                if name in module._get_available_adapters():
                    others = {} if isinstance(module, BaseTunerLayer) else {"new_active_adapters": None}
                    getattr(module, "drop_adapter", module.delete_adapter)(name, **others)
        if not module._get_available_adapters():
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, base_module(module))
    configs = getattr(model, "peft_config", None)
    if keep_configs or configs is None:
        return
    for name in names:
        configs.pop(name, None)
    if not adapted_modules(model):
        del model.peft_config
        if hasattr(model, "_hf_peft_config_loaded"):
            # Otherwise diffusers takes it that there are adapters.
            model._hf_peft_config_loaded = False  # type: ignore[assignment]


def adapted_modules(model: nn.Module) -> dict[str, BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """Return the wrappers around modules with adapters, by name, without wrappers inside of other wrappers."""
    found: dict[str, BaseTunerLayer | AuxiliaryTrainingWrapper] = {}
    for path, module in model.named_modules():
        if is_wrapper(module) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def adapter_names_in(model: nn.Module) -> set[str]:
    """Return the names of all adapters in a model's layers, of any method."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {name for layer in layers for part in layer.adapter_layer_names for name in getattr(layer, part, ())}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode during a context; restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_class(module: nn.Module, *names: str) -> bool:
    """Whether a module is an instance of a class with one of these names; for classes that are not imported."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def is_wrapper(module: nn.Module) -> TypeGuard[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """Whether this module is a wrapper that PEFT has put around a module of the model."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def base_module(module: BaseTunerLayer | AuxiliaryTrainingWrapper) -> nn.Module:
    """Return the module inside a wrapper of PEFT."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
