"""A bank's file, as `AdapterBank.save` writes it, read with suspicion. Knows safetensors and configurations; knows no bank."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from .saved_adapter import SavedAdapter
from .tuner import FunLoraConfig
from .tuner.hotswap import SAVED_PREFIX


ROWS = "adapters"
METADATA = "adapter_bank"


@dataclass(frozen=True)
class SavedBank:
    """
    What a bank's file says, before any of its numbers is read.

    Args:
        file: as it was asked for.
        config: that its adapters share.
        shapes: tensors of one adapter in the order in which they lie in a row, on the meta device, by the keys that PEFT saves
            them under, less its prefix.
        classes: id -> name, by row.
    """

    file: str
    config: FunLoraConfig
    shapes: dict[str, torch.Tensor]
    classes: dict[int, str]

    @property
    def numel(self) -> int:
        """How many numbers a row has."""
        return sum(tensor.numel() for tensor in self.shapes.values())

    def check_fits(self, model: nn.Module) -> None:
        """As [`SavedAdapter.check_fits`], for all adapters at once."""
        shapes = {f"{SAVED_PREFIX}{key}": tensor for key, tensor in self.shapes.items()}
        SavedAdapter(self.file, Path(self.file).parent, self.config, shapes).check_fits(model)

    def rows(self) -> torch.Tensor:
        """A row of numbers for each class, `(classes, numel)`, mapped into memory. Raises a ValueError for another table."""
        try:
            rows = load_file(self.file).get(ROWS)
        except SafetensorError as error:
            raise ValueError(f"{self.file!r} is damaged: {error}.") from error
        expected = (len(self.classes), self.numel)
        if rows is None or rows.shape != expected or not rows.is_floating_point():
            found = "nothing" if rows is None else f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise ValueError(f"{self.file!r} holds {found}, expected a row for every class, {expected}.")
        return rows


def read_bank(file: str | os.PathLike) -> SavedBank:
    """
    Look at a bank's file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged one, or one that `AdapterBank.save` did not write.
    """
    name = os.fspath(file)
    if not Path(file).is_file():
        raise FileNotFoundError(f"`file` is {name!r}, which is not there.")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{name!r} is not a sound safetensors file: {error}.") from error
    fields = ("config", "layout", "classes")
    missing = [field for field in fields if not isinstance(metadata, dict) or field not in metadata]
    if missing:
        raise ValueError(f"{name!r} has no {', '.join(missing)}: it was not written by AdapterBank.save.")
    settings, layout, classes = (metadata[field] for field in fields)
    config = _config(settings, name)
    try:
        shapes = {str(key): torch.empty(shape, device="meta") for key, shape in layout}
        names = {int(label): str(class_name) for label, class_name in classes}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name!r} is damaged: its list of tensors or of classes cannot be read ({error})."
        ) from error
    return SavedBank(name, config, shapes, names)


def _config(settings: Any, file: str) -> FunLoraConfig:
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "FUNLORA":
        raise ValueError(f"{file!r} holds adapters of type {kind}, expected FUNLORA.")
    try:
        return FunLoraConfig(**{**settings, "inference_mode": True})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file!r} has a config that FunLoraConfig does not take: {error}") from error
