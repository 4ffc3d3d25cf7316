"""Read the untrusted file of an AdapterBank, before a model is changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tuner import FunLoraConfig
from ..utils.checks import check_class_label, check_class_name, shortened
from ..utils.files import parse_json, read_tensors
from .untrusted_adapter import REMEDY, bankable, brief, check_tensors, config_from, read_header


ROWS = "adapters"
METADATA = "adapter_bank"
# The limit of safetensors itself; a million classes with their names take less.
_MOST_HEADER_BYTES = 10**8
_PARTS = ("config", "layout", "classes")


@dataclass(frozen=True)
class SavedBank:
    """The contents of a bank's file, before any of its numbers is read.

    Args:
        file: its path, as given.
        config: config of all its adapters.
        shapes: the tensors of a row by the keys under which PEFT saves them, without its prefix, on the meta device.
        classes: id -> name, in the order of the rows.
        table: the shape of its numbers, `(classes, numel)` in a valid file; None: there are none.
    """

    file: str
    config: FunLoraConfig
    shapes: dict[str, torch.Tensor]
    classes: dict[int, str]
    table: tuple[int, ...] | None

    @property
    def numel(self) -> int:
        """The number of parameters of a class."""
        return sum(tensor.numel() for tensor in self.shapes.values())

    def check_fits(self, model: nn.Module) -> None:
        """Raise a ValueError unless the config makes exactly such rows on a model; needs no memory for them."""
        try:
            check_tensors(self.config, self.shapes, model)
        except ValueError as error:
            raise ValueError(f"{self.file!r} does not fit this model: {error}") from error
        self._check_table()

    def rows(self) -> torch.Tensor:
        """Return the numbers, `(classes, numel)`, mapped into memory. Raises a ValueError for another table, or a damaged file."""
        self._check_table()
        return read_tensors(Path(self.file), remedy=REMEDY)[ROWS]

    def _check_table(self) -> None:
        expected = (len(self.classes), self.numel)
        if self.table != expected:
            found = "nothing" if self.table is None else f"a table of shape {self.table}"
            raise ValueError(f"{self.file!r} has {found}, expected a row for every class, {expected}.")


def read_bank(file: str | os.PathLike) -> SavedBank:
    """Read all but the numbers of a file that `AdapterBank.save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or is not a bank's.
    """
    name = os.fspath(file)
    if not Path(file).is_file():
        raise FileNotFoundError(f"`file` is {name!r}, which does not exist.")
    tensors, metadata = read_header(Path(file), most_bytes=_MOST_HEADER_BYTES)
    try:
        about = parse_json(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise ValueError(
            f"{name!r} has a `{METADATA}` that is not valid JSON: {shortened(str(error), 1000)}."
        ) from error
    missing = [part for part in _PARTS if not isinstance(about, dict) or part not in about]
    if missing:
        raise ValueError(f"{name!r} has no {', '.join(missing)}: it was not written by AdapterBank.save.")
    config, layout, classes = (about[part] for part in _PARTS)
    table = tuple(tensors[ROWS].shape) if ROWS in tensors else None
    known = {**config, "inference_mode": True} if isinstance(config, dict) else config
    shared = bankable(config_from(known, name), repr(name))
    try:
        shapes = {str(key): torch.empty(size, device="meta") for key, size in layout}
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{name!r}: `layout` has {shortened(repr(layout), 100)}, expected [key, shape] for each tensor: {brief(error)}."
        ) from error
    if len(shapes) < len(layout):
        raise ValueError(f"{name!r}: `layout` has a key twice.")
    return SavedBank(name, shared, shapes, _classes(classes, name), table)


def _classes(classes: Any, file: str) -> dict[int, str]:
    """Return id -> name from a list of `[id, name]`."""
    names: dict[int, str] = {}
    for entry in classes if isinstance(classes, list) else [classes]:
        if not isinstance(entry, list) or [type(part) for part in entry] != [int, str]:
            raise ValueError(f"{file!r}: `classes` has {shortened(repr(entry), 100)}, expected [id, name].")
        label, name = entry
        try:
            check_class_label(label)
            check_class_name(name)
        except ValueError as error:
            raise ValueError(f"{file!r}: `classes`: {error}") from error
        if label in names:
            raise ValueError(f"{file!r}: `classes` has the id {label} twice.")
        names[label] = name
    return names
