"""Register new methods with PEFT."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from peft.utils.peft_types import register_peft_method


def extend_peft_type(name: str) -> PeftType:
    """Return the member of PEFT's closed enum of methods with this name (upper case) and value; add it if it is missing."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, *, config_cls: type, model_cls: type) -> None:
    """Register a method with PEFT, once.

    Raises:
        RuntimeError: PEFT, or another package, already has a method of this name.
    """
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(extend_peft_type(name.upper()))
    if present is config_cls:
        return
    if present is not None:
        raise RuntimeError(
            f"PEFT already has a method {name!r}, {present.__module__}.{present.__qualname__}. Use that one, or install a "
            "release of peft without it."
        )
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
