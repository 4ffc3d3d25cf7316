"""Keeps diffusers models with adapters in them from being saved as if they had none.

Knows diffusers' `save_pretrained` and PEFT's layers; knows nothing of methods, pipelines or training.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


_METHOD = "save_pretrained"


def guard_saving(model: nn.Module) -> None:
    """
    Have `save_pretrained` of a diffusers model, or of those inside a model, raise a ValueError while adapters are in it.

    diffusers would write the wrapped layers under names that it does not find again: it loads such a file with random
    weights in their place, and only warns.

    Args:
        model (`torch.nn.Module`): that adapters are about to be put into; once more changes nothing.
    """
    for module in model.modules():
        if isinstance(module, ModelMixin) and _METHOD not in vars(module):
            # Copies and pickles of the model bring a guard of their own: it is made of the model as the copy sees it.
            setattr(module, _METHOD, partial(_save_if_plain, module))


def release_saving(model: nn.Module) -> None:
    """Take the guards off again, where no adapter is left. A guard that stays lets a plain model be saved, too."""
    for module in model.modules():
        if isinstance(module, ModelMixin) and is_guarded(module) and not has_adapters(module):
            delattr(module, _METHOD)


def is_guarded(model: nn.Module) -> bool:
    """Whether `guard_saving` is at work on this very model."""
    method = vars(model).get(_METHOD)
    return isinstance(method, partial) and method.func is _save_if_plain


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has wrapped modules of a model, whichever method it was; also if no adapter is left in a wrapper."""
    return any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules())


def _save_if_plain(model: ModelMixin, *args: Any, **kwargs: Any) -> None:
    if has_adapters(model):
        raise ValueError(
            f"This {type(model).__name__} has adapters in it, and would be saved under names that `from_pretrained` does not "
            "find. Save the adapter with `PeftModel.save_pretrained`; the base and its adapters with "
            "`FunLoraPipeline.save_pretrained`; one class as a plain U-Net with `merge_class(pipe, class_label)` and its "
            "`save_pretrained`; or take the adapters off first, with `unload()` or `merge_and_unload()`."
        )
    return getattr(type(model), _METHOD)(model, *args, **kwargs)


# diffusers' pipelines look up here which arguments a component takes.
_save_if_plain.__signature__ = inspect.signature(ModelMixin.save_pretrained)
