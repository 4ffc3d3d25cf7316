"""The file of an AdapterBank, read with suspicion, before a model is touched."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..tuner import FunLoraConfig
from ..utils.checks import check_class_label, check_class_name, listed, shortened
from ..utils.tensors import misnamed, misshapen
from .untrusted_adapter import DTYPES, check_tensors, config_from, parse_json, unsound


ROWS = "adapters"
METADATA = "adapter_bank"
_MOST_NUMBERS = 2**40
_PARTS = ("config", "layout", "classes")


@dataclass(frozen=True)
class SavedBank:
    """
    What a bank's file says, before any of its numbers is read.

    Args:
        file: as it was asked for.
        config: of all adapters in it.
        shapes: what a row is made of, by the keys that PEFT saves tensors under less its prefix, on the meta device.
        classes: names by id, in the order of the rows.
        table: the shape of its numbers, `(classes, numel)` in a sound file; None: it has none.
    """

    file: str
    config: FunLoraConfig
    shapes: dict[str, torch.Tensor]
    classes: dict[int, str]
    table: tuple[int, ...] | None

    @property
    def numel(self) -> int:
        """How many numbers a class has."""
        return sum(tensor.numel() for tensor in self.shapes.values())

    def check_fits(self, model: nn.Module) -> None:
        """Raise a ValueError unless a row is just what the config makes on a model, of which no memory is taken."""
        try:
            check_tensors(self.config, self.shapes, model)
        except ValueError as error:
            raise ValueError(f"{self.file!r} does not fit this model: {error}") from error
        self._check_table()

    def check_row(self, live: Mapping[str, torch.Tensor]) -> None:
        """Raise a ValueError unless a row is just what these tensors of an adapter in a model hold."""
        problems = [*misnamed(live, self.shapes), *misshapen(live, self.shapes)]
        if problems:
            raise ValueError(f"{self.file!r} does not fit this model:\n{listed(problems)}")

    def rows(self) -> torch.Tensor:
        """The numbers, `(classes, numel)`, mapped into memory. Raises a ValueError for another table, or a damaged file."""
        self._check_table()
        try:
            return load_file(self.file)[ROWS]
        except (SafetensorError, OSError) as error:
            unsound(Path(self.file), error)

    def _check_table(self) -> None:
        expected = (len(self.classes), self.numel)
        if self.table != expected:
            found = "nothing" if self.table is None else f"a table of shape {self.table}"
            raise ValueError(f"{self.file!r} holds {found}, expected a row for every class, {expected}.")


def read_bank(file: str | os.PathLike) -> SavedBank:
    """
    Read what a file that `AdapterBank.save` wrote is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, or not a bank's.
    """
    name = os.fspath(file)
    if not Path(file).is_file():
        raise FileNotFoundError(f"`file` is {name!r}, which is not there.")
    try:
        with safe_open(name, framework="pt") as opened:
            metadata = (opened.metadata() or {}).get(METADATA, "{}")
            part = opened.get_slice(ROWS) if ROWS in opened.keys() else None  # noqa: SIM118 - no mapping
            dtype, table = (None, None) if part is None else (part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        unsound(Path(file), error)
    about = parse_json(metadata, name)
    missing = [part for part in _PARTS if not isinstance(about, dict) or part not in about]
    if missing:
        raise ValueError(f"{name!r} has no {', '.join(missing)}: it was not written by AdapterBank.save.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{name!r} holds numbers of type {dtype}, expected {', '.join(DTYPES)}.")
    config, layout, classes = (about[part] for part in _PARTS)
    shapes = {key: torch.empty(size, device="meta") for key, size in _layout(layout, name).items()}
    return SavedBank(name, _config(config, name), shapes, _classes(classes, name), table)


def _config(settings: Any, file: str) -> FunLoraConfig:
    found = settings.get("peft_type") if isinstance(settings, Mapping) else None
    if found != "FUNLORA":
        raise ValueError(f"{file!r} holds adapters of type {shortened(str(found), 100)}, expected FUNLORA.")
    config = config_from({**settings, "inference_mode": True}, file)
    if config.modules_to_save:
        raise ValueError(f"{file!r}: `modules_to_save` is set, expected None: a bank holds adapters, not modules.")
    return config


def _layout(layout: Any, file: str) -> dict[str, list[int]]:
    """Shapes by key, of a list of `[key, shape]`."""
    sizes = {}
    for entry in layout if isinstance(layout, list) else [layout]:
        if not (_is_pair(entry, str, list) and all(type(size) is int and size >= 0 for size in entry[1])):
            raise ValueError(f"{file!r}: `layout` has {shortened(repr(entry), 100)}, expected [key, shape].")
        if entry[0] in sizes:
            raise ValueError(f"{file!r}: `layout` has {shortened(repr(entry[0]), 100)} twice.")
        if math.prod(entry[1]) > _MOST_NUMBERS or max(entry[1], default=0) > _MOST_NUMBERS:
            raise ValueError(
                f"{file!r}: `layout` has {shortened(repr(entry), 100)}, expected {_MOST_NUMBERS} numbers at most."
            )
        sizes[entry[0]] = entry[1]
    return sizes


def _classes(classes: Any, file: str) -> dict[int, str]:
    """Names by id, of a list of `[id, name]`."""
    names = {}
    for entry in classes if isinstance(classes, list) else [classes]:
        if not _is_pair(entry, int, str):
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


def _is_pair(entry: Any, first: type, second: type) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], first) and isinstance(entry[1], second)
