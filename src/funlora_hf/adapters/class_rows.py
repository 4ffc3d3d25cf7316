"""ClassRows: classes of one configuration, stored as rows of numbers, some of them in adapters of a model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from peft import PeftConfig, inject_adapter_in_model
from torch import nn

from ..tuner import FunLoraConfig
from ..tuner.hotswap import SAVED_PREFIX, plain_key, wrapped_model
from ..tuner_base.layer import AdapterLayer, adapter_layers
from ..tuner_base.weights import forget
from ..tuner_base.wrappers import remove_adapters
from ..utils.checks import listed
from ..utils.tensors import not_finite
from .untrusted_adapter import SavedAdapter, bankable, differences, exact_targets, restore_targets
from .untrusted_bank import SavedBank


# The settings that all adapters of a bank share. Their tensors also show which layers they have.
_SHARED = ("function", "operation", "r", "ratio", "num_functions", "train_omega", "class_embedding")
_Rows = TypeVar("_Rows", bound="ClassRows")


def differing_settings(config: PeftConfig, expected: FunLoraConfig) -> list[tuple[str, object, object]]:
    """Return name, value and expected value of each setting in which a config differs, of those that adapters of a bank share."""
    pairs = ((name, getattr(config, name, None), getattr(expected, name)) for name in _SHARED)
    return [(name, found, wanted) for name, found, wanted in pairs if found != wanted]


class ClassRows:
    """FunLoRA adapters of one configuration, stored as rows of numbers. The model has one adapter for each class that acts now.

    A row `(numel,)` has the tensors of a class, flattened, in the order of the model's modules.

    Args:
        model (`torch.nn.Module`): the base, whose layers are wrapped in place, or a model that has this adapter already.
        config (`FunLoraConfig`): the config of all adapters, without `modules_to_save`.
        adapter_name (`str`): name of the first adapter in the model.
        beside (sequence of `ClassRows`, *optional*): those of other configurations on the same model.

    Raises:
        ValueError: `modules_to_save`, or a model with other adapters, or with this one in another configuration.
    """

    _live: str | None = None  # an adapter that `place` does not use

    def __init__(
        self, model: nn.Module, config: FunLoraConfig, adapter_name: str, *, beside: Sequence[ClassRows] = ()
    ) -> None:
        bankable(config, "`config`")
        self.model = wrapped_model(model)
        self.adapter_name = adapter_name
        found = {name for layer in adapter_layers(self.model) for name in layer.settings}
        others = sorted(found.difference([adapter_name], *(rows.adapter_names for rows in beside)))
        if others:
            raise ValueError(
                f"`model` has the adapters {', '.join(others)}, expected none besides {adapter_name!r}: unload them."
            )
        if not _layers(self.model, adapter_name):
            # Without a change of which adapters are active.
            active = {layer: layer.active_adapters for layer in adapter_layers(self.model)}
            # What only one class has is no part of a bank.
            own = replace(config, class_label=None, class_name=None, started_from=None)
            inject(self.model, own, adapter_name)
            for layer, names in active.items():
                layer.set_adapter(names, inference_mode=True)
        self._layers = _layers(self.model, adapter_name)
        self.config = bankable(self._layers[0].settings[adapter_name], f"adapter {adapter_name!r}")
        self._check_shared(config, "config")
        # The parameters of all adapters, by the keys under which PEFT saves them, without its prefix.
        self._parts = {
            plain_key(f"{path}.{part}"): getattr(layer, part)
            for path, layer in self.model.named_modules()
            if isinstance(layer, AdapterLayer)
            for part in layer.adapter_layer_names
            if adapter_name in getattr(layer, part)
        }
        self._shapes = [tensor.shape for tensor in self.live_tensors.values()]
        # All adapters in the model, and those that `place` gave to classes.
        self.adapter_names: list[str] = [adapter_name]
        self._placed: dict[int, str] = {}
        self._rows: dict[int, torch.Tensor] = {}
        # Classes of a file whose numbers have not been read yet.
        self._unchecked: set[int] = set()
        # Layers that other rows also use may be active for those.
        self._switch([layer for layer in self._layers if set(layer.settings) == {adapter_name}], on=False)

    @classmethod
    def of_file(
        cls: type[_Rows], saved: SavedBank, model: nn.Module, adapter_name: str, **options: Sequence[ClassRows]
    ) -> _Rows:
        """Load all classes of a bank's file, without reading their numbers; args and errors as for the class."""
        is_new = not _layers(wrapped_model(model), adapter_name)
        if is_new:
            saved.check_fits(model)
        rows = cls(model, exact_targets(saved.config, saved.shapes), adapter_name, **options)
        if is_new:
            restore_targets(rows.config, saved.config)
        try:
            rows._check_fits(saved.shapes, f"The tensors of {saved.file!r}")
            keys, sizes = list(rows._parts), [tensor.numel() for tensor in saved.shapes.values()]
            for class_label, row in zip(saved.classes, saved.rows(), strict=True):
                if keys != list(saved.shapes):  # another version of the model may list its modules in another order
                    parts = dict(zip(saved.shapes, row.split(sizes), strict=True))
                    row = torch.cat([parts[key] for key in keys])
                rows._rows[class_label] = row
                rows._unchecked.add(class_label)
        except Exception:
            rows.unload()
            raise
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, class_label: object) -> bool:
        return class_label in self._rows

    def takes(self, adapter: SavedAdapter) -> bool:
        """Return whether an adapter has the same configuration, names and shapes as these."""
        shared = not differing_settings(adapter.config, self.config)
        return shared and not differences(self.live_tensors, adapter.shapes)

    def place(self, class_labels: Collection[int]) -> dict[int, str]:
        """Fill adapters in the model with these classes; return class -> name of its adapter, valid until the next call.

        The live adapter of a bank does not change.

        Args:
            class_labels (`Collection[int]`): known classes; duplicates count once.

        Raises:
            ValueError: an unknown class, a class with numbers that are not finite, or an adapter that is merged into the base's
                weights. Nothing has changed then.
        """
        self._check_unmerged()
        rows = {label: self._finite_row(label) for label in class_labels}
        kept = {label: name for label, name in self._placed.items() if label in rows}
        taken = [self._live, *kept.values()]
        free = [name for name in self.adapter_names if name not in taken]
        for label in rows:
            if label not in kept:
                kept[label] = free.pop(0) if free else self._add_place()
                self._fill(kept[label], rows[label])
        self._placed = kept
        return dict(kept)

    def insert(self, state_dict: Mapping[str, torch.Tensor], class_label: int, what: str = "The tensors") -> None:
        """Add a class by its tensors, as PEFT saves them; errors call them `what`."""
        if class_label in self._rows:
            raise ValueError(f"`class_label` is {class_label}, a class that is in the bank already: remove it first.")
        self._check_fits(state_dict, what)
        given = {plain_key(key): tensor for key, tensor in state_dict.items()}
        row = self._cast(torch.cat([given[key].detach().reshape(-1) for key in self._parts]))
        if not torch.isfinite(row).all():
            raise ValueError(f"{what} have numbers that are too large for {row.dtype}, nothing was added.")
        self._rows[class_label] = row

    def remove(self, class_label: int) -> None:
        """Remove a class. Raises a ValueError if there is no such class."""
        self._row_of(class_label)
        if class_label in self._placed:
            self._clear(self._placed.pop(class_label))
        self._unchecked.discard(class_label)
        del self._rows[class_label]

    def unload(self) -> None:
        """Remove the adapters from the model, which is then the base again; this object cannot be used afterwards."""
        remove_adapters(self.model, self.adapter_names)

    def state_dict(self, class_label: int) -> dict[str, torch.Tensor]:
        """Return copies of a class's tensors by the keys under which PEFT saves them. Raises a ValueError for an unknown class."""
        parts = zip(self._parts, self._split(self._row_of(class_label)), strict=True)
        return {f"{SAVED_PREFIX}{key}": part.clone() for key, part in parts}

    @property
    def live_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters of the first adapter, by the keys under which PEFT saves them, without its prefix."""
        return {key: part[self.adapter_name] for key, part in self._parts.items()}

    def _cast(self, row: torch.Tensor) -> torch.Tensor:
        """Return a row as it would be in the model: on its device, in its dtype, at least float32."""
        own = next(iter(self._parts.values()))[self.adapter_name]
        return row.to(own.device, torch.promote_types(own.dtype, torch.float32))

    def _split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of a row, as views of it."""
        parts = row.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    # Values that are set in inference mode could not be changed outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _fill(self, adapter_name: str, row: torch.Tensor) -> None:
        """Give an adapter the values of a row."""
        for layer in self._layers:
            layer.stop_offloading_adapters()
            forget(layer)
        tensors = [part[adapter_name] for part in self._parts.values()]
        for tensor in tensors:
            if tensor.dtype.itemsize < torch.float32.itemsize:  # the model was cast
                tensor.data = tensor.data.float()
        torch._foreach_copy_(tensors, self._split(self._cast(row)))

    def _clear(self, adapter_name: str) -> None:
        """Remove the values of the last row from the model."""
        self._fill(adapter_name, torch.zeros(sum(shape.numel() for shape in self._shapes)))

    def _check_shared(self, config: FunLoraConfig, source: str) -> None:
        differ = ", ".join(
            f"`{name}` is {found!r}, not {expected!r}"
            for name, found, expected in differing_settings(config, self.config)
        )
        if differ:
            raise ValueError(
                f"The configuration of {source!r} does not fit this bank's: {differ}. Use another bank for it."
            )

    def _check_fits(self, state_dict: Mapping[str, torch.Tensor], what: str) -> None:
        problems = [*differences(self.live_tensors, state_dict), *not_finite(state_dict)]
        if problems:
            raise ValueError(f"{what} do not fit this bank, nothing was added:\n{listed(problems)}")

    def _row_of(self, class_label: int) -> torch.Tensor:
        if class_label not in self._rows:
            known = ", ".join(map(str, list(self._rows)[:20])) or "none"
            more = ", ..." if len(self._rows) > 20 else ""
            raise ValueError(f"`class_label` is {class_label!r}, expected a class of the bank: {known}{more}.")
        return self._rows[class_label]

    def _finite_row(self, class_label: int) -> torch.Tensor:
        row = self._row_of(class_label)
        if class_label in self._unchecked:
            # A number of a wider type may be too large for the adapter's type.
            if not torch.isfinite(self._cast(row)).all():
                raise ValueError(
                    f"Class {class_label} has numbers that are not finite: add it again from a valid adapter."
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

    def _add_place(self) -> str:
        """Add an adapter to the model."""
        name = f"{self.adapter_name}_{len(self.adapter_names)}"
        # Its start values are replaced at once, so they must not use the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            for layer in self._layers:
                layer.update_layer(name, self.config)
        self.adapter_names.append(name)
        return name


@contextmanager
def adapters_enabled(model: nn.Module) -> Iterator[None]:
    """Enable the disabled adapter layers of a model, and disable them again afterwards."""
    disabled = [layer for layer in adapter_layers(model) if layer.disable_adapters]
    for layer in disabled:
        layer.enable_adapters(True)
        # Enabling makes active adapters trainable, and then their weights are not kept.
        layer.set_adapter(layer.active_adapters, inference_mode=True)
    try:
        yield
    finally:
        for layer in disabled:
            layer.enable_adapters(False)


def _layers(model: nn.Module, adapter_name: str) -> list[AdapterLayer]:
    """Return the layers that have an adapter of this name."""
    return [layer for layer in adapter_layers(model) if adapter_name in layer.settings]


def inject(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Put an adapter into a model, which may have others already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, adapter_name)
