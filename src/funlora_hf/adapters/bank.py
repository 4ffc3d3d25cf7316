"""AdapterBank: any number of classes as rows of numbers, one of them live in a model at a time."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from ..tuner import FunLoraConfig, mixed_batch
from ..tuner.hotswap import SAVED_PREFIX, plain_key, wrapped_model
from ..tuners_utils.layer import BASE, AdapterLayer, adapter_layers
from ..tuners_utils.wrappers import remove_adapters
from ..utils.checks import listed
from ..utils.files import whole_file
from ..utils.tensors import misnamed, misshapen, not_finite
from .base_fingerprint import FingerprintCheck
from .base_model import load_base
from .class_folder import adapter_folders
from .class_folder import adapter_name as class_adapter_name
from .flat_adapter import FlatAdapter
from .untrusted_adapter import ADAPTER_FILES, SavedAdapter, exact_targets, fetch, read_adapter, restore_targets
from .untrusted_bank import METADATA, ROWS, SavedBank, read_bank


# What all adapters of a bank share; which layers they have, their tensors show.
_SHARED = ("function", "operation", "r", "ratio", "num_functions", "train_omega", "class_embedding")


class AdapterBank:
    """
    Many FunLoRA adapters of one configuration for one model, of which one is live.

    PEFT's way, an adapter in the model for every class, takes time for each of them whenever one is added or switched on.
    Here the model holds one adapter, and a class is one row of numbers: making it live is one copy, however many there
    are, a compiled model stays compiled, and a thousand classes load from one file. For a batch of several classes
    (`mixed_batch`) the model gets as many more adapters as there are classes in the batch.

    Args:
        model (`torch.nn.Module`):
            The base, such as a `UNet2DModel`; its layers are wrapped in place. Or a model that has this adapter already.
        config (`FunLoraConfig`):
            What the adapters are made of. Without `modules_to_save`.
        adapter_name (`str`, *optional*, defaults to `"live"`): of the one adapter in the model.
        beside (sequence of `AdapterBank`, *optional*):
            Banks that serve other configurations on the same model. This one's classes then act by `mixed_batch` only.

    Raises:
        ValueError: `modules_to_save`, or a model with other adapters, or with this one in another configuration.

    Example:

        ```py
        >>> bank = AdapterBank(unet, FunLoraConfig.from_pretrained("outputs/digits/adapters/class_2"))
        >>> for label in range(2, 10):
        ...     bank.add(f"outputs/digits/adapters/class_{label}")
        >>> bank.activate(7)
        >>> bank.save("digits.safetensors")
        ```

    Source: [ours].
    """

    def __init__(
        self,
        model: nn.Module,
        config: FunLoraConfig,
        adapter_name: str = "live",
        *,
        beside: Sequence[AdapterBank] = (),
    ) -> None:
        if config.modules_to_save:
            raise ValueError(
                f"`modules_to_save` is {list(config.modules_to_save)}, expected None: a bank holds adapters, not modules."
            )
        self.model = wrapped_model(model)
        self.adapter_name = adapter_name
        self._is_beside_others = bool(beside)
        _check_alone(self.model, [adapter_name, *(name for bank in beside for name in bank.adapter_names)])
        if not _layers(self.model, adapter_name):
            _inject(self.model, replace(config, class_label=None, class_name=None), adapter_name)
        self._layers = _layers(self.model, adapter_name)
        self.config: FunLoraConfig = self._layers[0].settings[adapter_name]
        _check_shared("config", config, self.config)
        self._live = FlatAdapter(self.model, adapter_name)
        self._base = FingerprintCheck(self.model)
        # Further adapters in the model, for mixed batches, and which of them hold which class.
        self._others: list[FlatAdapter] = []
        self._placed: dict[int, FlatAdapter] = {}
        self._rows: dict[int, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        # Classes from a bank's file, of which no number has been read yet.
        self._unchecked: set[int] = set()
        self._active: int | None = None
        # A layer that another bank uses, too, may be at work for it.
        self._switch([layer for layer in self._layers if set(layer.settings) == {adapter_name}], on=False)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, class_label: object) -> bool:
        return class_label in self._rows

    @property
    def classes(self) -> dict[int, str]:
        """Ids and names of the classes in the bank, in the order in which they came."""
        return dict(self._names)

    @property
    def live_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters of the live adapter, by the keys that PEFT saves them under, less its prefix."""
        return dict(self._live.tensors)

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that the bank has put into the model: the live one, and those for mixed batches."""
        return [self.adapter_name, *(adapter.name for adapter in self._others)]

    @property
    def active(self) -> int | None:
        """The live class; None: the base."""
        return self._active

    def takes(self, adapter: SavedAdapter) -> bool:
        """Whether an adapter is made as those of the bank: by its config, names and shapes."""
        live, given = self._live.tensors, {plain_key(key): shape for key, shape in adapter.shapes.items()}
        shared = all(getattr(adapter.config, name) == getattr(self.config, name) for name in _SHARED)
        return shared and not misnamed(live, given) and not misshapen(live, given)

    def activate(self, class_label: int | None) -> None:
        """
        Make a class live in the model, or None of them: the base.

        Takes one copy of a few kilobytes, independent of how many classes there are. Not between a forward and its backward.

        Raises:
            ValueError: a class that is not in the bank or has numbers that are not finite, or a live adapter that is merged
                into the base's weights. Nothing has changed then.
        """
        if self._is_beside_others and class_label is not None:
            raise ValueError("A bank beside others has no live class: run its classes inside `mixed_batch`.")
        self._check_unmerged()
        if class_label is not None:
            self._live.copy_(self._finite_row(class_label))
        self._switch(self._layers, on=class_label is not None)
        self._active = class_label

    @contextmanager
    def mixed_batch(self, class_labels: Sequence[int | None]) -> Iterator[None]:
        """
        Run every sample of a batch through a class of its own, as the function `mixed_batch` does for adapters by name.

        Args:
            class_labels (`Sequence[int | None]`): the class of every sample; None: the base. Sorted by class they run fastest.

        Raises:
            ValueError: as `activate`, or a batch of another length.
        """
        placed = self.place([label for label in class_labels if label is not None])
        names = [BASE if label is None else placed[label] for label in class_labels]
        with adapters_enabled(self.model), mixed_batch(self.model, names):
            yield

    def place(self, class_labels: Collection[int]) -> dict[int, str]:
        """
        Have adapters in the model hold these classes, besides the live one.

        Args:
            class_labels (`Collection[int]`): classes of the bank; several times the same counts once.

        Returns:
            `dict[int, str]`: the name of each one's adapter. Valid until the next call.

        Raises:
            ValueError: as `activate`.
        """
        self._check_unmerged()
        rows = {label: self._finite_row(label) for label in class_labels}
        kept = {label: adapter for label, adapter in self._placed.items() if label in rows}
        free = [adapter for adapter in self._others if adapter not in kept.values()]
        for label in rows:
            if label not in kept:
                kept[label] = free.pop(0) if free else self._add_place()
                kept[label].copy_(rows[label])
        self._placed = kept
        return {label: adapter.name for label, adapter in kept.items()}

    def add(
        self,
        source: str | os.PathLike,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        class_label: int | None = None,
        class_name: str | None = None,
        local_files_only: bool = False,
        ignore_base_fingerprint: bool = False,
    ) -> int:
        """
        Add the class of a saved adapter. Only its JSON and its safetensors file are read.

        Args:
            source (`str` or `os.PathLike`): a folder written by PEFT's `save_pretrained`, or a repository on the Hub.
            subfolder (`str`, *optional*): where in it the adapter lies.
            revision (`str`, *optional*): branch, tag or commit of a repository.
            class_label (`int`, *optional*): id of the class; None: the one in the adapter's config.
            class_name (`str`, *optional*): its name; None: the one in the config, or else the id as text.
            local_files_only (`bool`, *optional*, defaults to `False`): take a repository from the cache.
            ignore_base_fingerprint (`bool`, *optional*, defaults to `False`): add it also if it was trained for another base.

        Returns:
            `int`: the id of the class.

        Raises:
            BaseMismatchError: the adapter was trained for another base.
            ValueError: no id or one that is taken, another configuration than the bank's, or tensors that are missing,
                unexpected, of another shape or not finite. The bank is as it was then.
            FileNotFoundError: a folder without an adapter, or no such repository.
        """
        adapter = read_adapter(source, subfolder=subfolder, revision=revision, local_files_only=local_files_only)
        config = adapter.config
        if not isinstance(config, FunLoraConfig):
            raise ValueError(
                f"`source` {adapter.source!r} holds an adapter of type {config.peft_type.value}, expected FUNLORA."
            )
        _check_shared(adapter.source, config, self.config)
        class_label = config.class_label if class_label is None else class_label
        if class_label is None:
            raise ValueError(f"The adapter {adapter.source!r} does not say which class it is: pass `class_label`.")
        if not ignore_base_fingerprint:
            self._base.check(config, adapter.source)
        if config.modules_to_save:
            raise ValueError(
                f"`modules_to_save` of {adapter.source!r} is {list(config.modules_to_save)}, expected None: a bank holds "
                "adapters, not modules."
            )
        what = f"The tensors of {adapter.source!r}"
        self._check_fits(adapter.shapes, what)
        return self._add(adapter.tensors(), class_label, class_name or config.class_name, what)

    def add_tensors(
        self, state_dict: Mapping[str, torch.Tensor], *, class_label: int, class_name: str | None = None
    ) -> int:
        """
        Add a class by its tensors, as PEFT saves them: what `get_peft_model_state_dict` gives.

        Args and errors are those of `add`.
        """
        return self._add(state_dict, class_label, class_name, "The tensors")

    def _add(self, state_dict: Mapping[str, torch.Tensor], class_label: int, class_name: str | None, what: str) -> int:
        if class_label in self._rows:
            raise ValueError(f"`class_label` is {class_label}, a class that is in the bank already: remove it first.")
        row = self._live.flatten(self._check_fits(state_dict, what))
        if not torch.isfinite(row).all():
            raise ValueError(f"{what} have numbers that are too large for {row.dtype}, nothing was added.")
        self._rows[class_label] = row
        self._names[class_label] = class_name or str(class_label)
        return class_label

    def _check_fits(self, state_dict: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
        """The tensors by the live adapter's keys."""
        given = {plain_key(key): value for key, value in state_dict.items()}
        live = self._live.tensors
        problems = [*misnamed(live, given), *misshapen(live, given), *not_finite(given)]
        if len(given) < len(state_dict):
            problems.append(f"{len(state_dict) - len(given)} tensors come twice, expected each of them once")
        if problems:
            raise ValueError(f"{what} do not fit this bank, nothing was added:\n{listed(problems)}")
        return given

    def remove(self, class_label: int) -> None:
        """Forget a class; if it is live, the base is live afterwards. Raises a ValueError for one that is not there."""
        self._row_of(class_label)
        if self._active == class_label:
            self.activate(None)
            self._live.copy_(torch.zeros(self._live.numel))
        if class_label in self._placed:
            self._placed.pop(class_label).copy_(torch.zeros(self._live.numel))
        self._unchecked.discard(class_label)
        del self._rows[class_label]
        del self._names[class_label]

    def unload(self) -> None:
        """Take the bank's adapters off the model, which is the base again; the bank itself is of no more use."""
        remove_adapters(self.model, self.adapter_names)

    def state_dict(self, class_label: int) -> dict[str, torch.Tensor]:
        """A class's tensors by the keys that PEFT saves them under; copies. Raises a ValueError if it is not there."""
        return {
            f"{SAVED_PREFIX}{key}": part.clone()
            for key, part in self._live.unflatten(self._row_of(class_label)).items()
        }

    def save(self, file: str | os.PathLike) -> None:
        """Write all classes into one safetensors file, which appears whole or not at all."""
        layout = [[key, list(tensor.shape)] for key, tensor in self._live.tensors.items()]
        classes = [[label, self._names[label]] for label in self._rows]
        # One entry: safetensors writes several in any order, and equal banks shall give equal files.
        metadata = {METADATA: json.dumps({"config": self.config.to_dict(), "layout": layout, "classes": classes})}
        rows = [row.cpu() for row in self._rows.values()]
        table = torch.stack(rows) if rows else torch.empty(0, self._live.numel)
        with whole_file(Path(file)) as temporary:
            save_file({ROWS: table}, temporary, metadata=metadata)

    @classmethod
    def load(
        cls,
        file: str | os.PathLike,
        model: nn.Module,
        adapter_name: str = "live",
        *,
        beside: Sequence[AdapterBank] = (),
        ignore_base_fingerprint: bool = False,
    ) -> AdapterBank:
        """
        A bank from a file that `save` wrote. The rows stay in the file, which is mapped into memory, until they are used.

        Args:
            file (`str` or `os.PathLike`): to read; it must not change while the bank is in use.
            model (`torch.nn.Module`): the base that the adapters were trained for.
            adapter_name (`str`, *optional*, defaults to `"live"`): of the one adapter in the model.
            beside (sequence of `AdapterBank`, *optional*): as for [`AdapterBank`].
            ignore_base_fingerprint (`bool`, *optional*, defaults to `False`): load adapters of another base, too.

        Raises:
            BaseMismatchError: the adapters were trained for another base.
            ValueError: not a bank's file, or one that does not fit the model: which tensors, is said.
            FileNotFoundError: no such file.
        """
        saved = read_bank(file)
        if not ignore_base_fingerprint:
            FingerprintCheck(model).check(saved.config, saved.file)
        is_new = not _layers(wrapped_model(model), adapter_name)
        if is_new:
            saved.check_fits(model)
        bank = cls(model, exact_targets(saved.config, saved.shapes), adapter_name, beside=beside)
        if is_new:
            restore_targets(bank.config, saved.config)
        try:
            saved.check_row(bank.live_tensors)
            bank._take_rows(saved)
        except Exception:
            bank.unload()
            raise
        return bank

    @classmethod
    def from_hub(
        cls,
        source: str | os.PathLike,
        model: nn.Module | None = None,
        *,
        classes: Collection[int] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        ignore_base_fingerprint: bool = False,
    ) -> AdapterBank:
        """
        A bank of the classes in a repository that has a folder `class_<id>` for each, as `push_all` lays them out.

        Args:
            source (`str` or `os.PathLike`): the repository, or a folder laid out like it.
            model (`torch.nn.Module`, *optional*): the base; None: the U-Net that the adapters' configs name, which is loaded.
            classes (collection of `int`, *optional*): the ids wanted, of which alone files are fetched; None: all there are.
            revision (`str`, *optional*): branch, tag or commit of the repository.
            local_files_only (`bool`, *optional*, defaults to `False`): take all from the cache, without asking the Hub.
            ignore_base_fingerprint (`bool`, *optional*, defaults to `False`): add adapters of another base, too.

        Returns:
            [`AdapterBank`], on `bank.model`.

        Raises:
            BaseMismatchError: an adapter was trained for another base.
            ValueError: no `model`, and the configs name none that can be loaded; adapters of several configurations; or as `add`.
                The model is then as it was.
            FileNotFoundError: no such repository, or a class that it has not.
        """
        names = ["class_*"] if classes is None else [class_adapter_name(label) for label in classes]
        files = [f"{name}/{file}" for name in names for file in ADAPTER_FILES]
        root = fetch(source, files, revision=revision, local_files_only=local_files_only)
        folders = adapter_folders(root) if classes is None else [root / name for name in names]
        if not folders:
            raise FileNotFoundError(f"{os.fspath(source)!r} has no folder class_<id>, expected one for each class.")
        first = read_adapter(folders[0])
        if not isinstance(first.config, FunLoraConfig):
            raise ValueError(
                f"{os.fspath(source)!r} holds adapters of type {first.config.peft_type.value}, expected FUNLORA."
            )
        if model is None:
            model = load_base(first.config, local_files_only=local_files_only)
        if not ignore_base_fingerprint:
            FingerprintCheck(model).check(first.config, first.source)
        first.check_fits(model)
        bank = cls(model, first.exact_config)
        try:
            for folder in folders:
                bank.add(folder, ignore_base_fingerprint=ignore_base_fingerprint)
        except Exception:
            bank.unload()
            raise
        return bank

    def _take_rows(self, saved: SavedBank) -> None:
        """Fill the bank from a file, of which no number is read."""
        live = self._live.tensors
        order = _order(list(live), list(saved.shapes), [tensor.numel() for tensor in saved.shapes.values()])
        for (label, name), row in zip(saved.classes.items(), saved.rows(), strict=True):
            self._rows[label] = row if order is None else row[order]
            self._names[label] = name
            self._unchecked.add(label)

    def _row_of(self, class_label: int) -> torch.Tensor:
        if class_label not in self._rows:
            known = ", ".join(map(str, list(self._rows)[:20])) or "none"
            more = ", ..." if len(self._rows) > 20 else ""
            raise ValueError(f"`class_label` is {class_label!r}, expected a class of the bank: {known}{more}.")
        return self._rows[class_label]

    def _finite_row(self, class_label: int) -> torch.Tensor:
        row = self._row_of(class_label)
        if class_label in self._unchecked:
            # A number of a wider type may be too large for the adapter's.
            if not torch.isfinite(self._live.cast(row)).all():
                raise ValueError(
                    f"Class {class_label} has numbers that are not finite: add it again from a sound adapter."
                )
            self._unchecked.remove(class_label)
        return row

    def _check_unmerged(self) -> None:
        if any(layer.merged for layer in self._layers):
            raise ValueError(f"Adapter {self.adapter_name!r} is merged into the base's weights: unmerge it first.")

    @staticmethod
    def _switch(layers: Sequence[AdapterLayer], *, on: bool) -> None:
        for layer in layers:
            if layer.disable_adapters == on:
                layer.enable_adapters(on)

    def _add_place(self) -> FlatAdapter:
        """One more adapter in the model."""
        name = f"{self.adapter_name}_{len(self._others) + 1}"
        # It gets other values at once, so its start must not take from the random numbers of who calls.
        with torch.random.fork_rng(devices=[]):
            for layer in self._layers:
                layer.update_layer(name, self.config)
        self._others.append(FlatAdapter(self.model, name))
        return self._others[-1]


@contextmanager
def adapters_enabled(model: nn.Module) -> Iterator[None]:
    """Enable the adapter layers of a model that are disabled, and disable them again afterwards."""
    disabled = [layer for layer in adapter_layers(model) if layer.disable_adapters]
    for layer in disabled:
        layer.enable_adapters(True)
    try:
        yield
    finally:
        for layer in disabled:
            layer.enable_adapters(False)


def _layers(model: nn.Module, adapter_name: str) -> list[AdapterLayer]:
    """The layers that have an adapter of this name."""
    return [layer for layer in adapter_layers(model) if adapter_name in layer.settings]


def _inject(model: nn.Module, config: FunLoraConfig, adapter_name: str) -> None:
    """Put an adapter into a model; those that are active there stay so."""
    active = {layer: layer.active_adapters for layer in adapter_layers(model)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, adapter_name)
    for layer, names in active.items():
        layer.set_adapter(names, inference_mode=True)


def _check_alone(model: nn.Module, own: Collection[str]) -> None:
    others = sorted({name for layer in adapter_layers(model) for name in layer.settings} - set(own))
    if others:
        raise ValueError(
            f"`model` has the adapters {', '.join(others)}, expected none besides {next(iter(own))!r}: unload them."
        )


def _check_shared(source: str, config: FunLoraConfig, expected: FunLoraConfig) -> None:
    differ = [name for name in _SHARED if getattr(config, name) != getattr(expected, name)]
    if differ:
        found = ", ".join(f"`{name}` is {getattr(config, name)!r}, not {getattr(expected, name)!r}" for name in differ)
        raise ValueError(f"The configuration of {source!r} does not fit this bank's: {found}. Use a bank of its own.")


def _order(wanted: Sequence[str], stored: Sequence[str], sizes: Sequence[int]) -> Any:
    """Indices that bring a stored row into the order wanted; None where it is that already."""
    if list(wanted) == list(stored):
        return None
    numbers = dict(zip(stored, torch.arange(sum(sizes)).split(list(sizes)), strict=True))
    return torch.cat([numbers[key] for key in wanted])
