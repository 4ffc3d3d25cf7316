"""Base classes of the comparison methods for convolutions: their configuration and their tuner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from torch import nn

from ..tuner_base.layer import AdapterLayer
from ..tuner_base.model import AdapterModel
from ..utils.checks import check_names, check_type


@dataclass
class ConvAdapterConfig(PeftConfig):
    """The arguments that every method here takes.

    Args:
        target_modules (`Union[list[str], str]`): Names of Conv2d modules to adapt, or a regex.
        exclude_modules (`Union[list[str], str]`, *optional*): Names of modules not to adapt, or a regex.
        modules_to_save (`list[str]`, *optional*): Modules besides the adapter that are trained and saved completely.
        trainable_token_indices (`dict[str, list[int]]`, *optional*): Rows of embeddings that the adapter trains and saves, as
            in PEFT's `LoraConfig`: `{"class_embedding": [0]}` makes row 0 of a U-Net's class embedding the adapter's class
            vector.
        init_weights (`bool`): True: the adapter starts as the identity. False: it starts at random values, for tests.

    Raises:
        ValueError: a value of the wrong type; it names the field.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: dict[str, list[int]] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("init_weights", self.init_weights, bool, "True or False")
        for name in ("target_modules", "exclude_modules"):
            check_names(name, getattr(self, name), single=True)
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        check_names("modules_to_save", self.modules_to_save, single=False)
        _check_rows(self.trainable_token_indices)

    def to_dict(self) -> dict:
        """Return the configuration as a dictionary, with sets as sorted lists: equal adapters give equal files."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


def _check_rows(value: object) -> None:
    """Raise a ValueError unless `value` is None or a mapping of names to lists of integers from 0."""
    rows = value if isinstance(value, Mapping) else {}
    if value is not None and not (
        rows
        and all(isinstance(name, str) and isinstance(indices, list) and indices for name, indices in rows.items())
        and all(type(index) is int and index >= 0 for indices in rows.values() for index in indices)
    ):
        raise ValueError(
            f"`trainable_token_indices` is {value!r}, expected a mapping of embedding names to lists of rows, or None."
        )


class ConvAdapterModel(AdapterModel):
    """A tuner whose layers wrap Conv2d; subclasses set `prefix` and `tuner_layer_cls`."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if not peft_config.target_modules:
            raise ValueError("Please specify `target_modules` in `peft_config`: names of Conv2d modules, or a regex.")

    def _layer_class(self, peft_config: ConvAdapterConfig, name: str, target: nn.Module) -> type[AdapterLayer]:
        if not isinstance(target, nn.Conv2d):
            raise ValueError(
                f"Target module {target} is not supported. Currently, only the following modules are supported: "
                "`torch.nn.Conv2d`."
            )
        return self.tuner_layer_cls
