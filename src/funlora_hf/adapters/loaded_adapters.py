"""The adapters that a pipeline has loaded, by class: FunLoRA's as rows, those of other methods in a PeftModel."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from torch import nn

from ..tuner import FunLoraConfig, mixed_batch
from ..tuner_base.layer import BASE
from ..tuner_base.model import AdapterModel
from ..tuner_base.weights import cached_weights
from ..tuner_base.wrappers import adapter_names_in, remove_adapters, without_peft
from .base_fingerprint import FingerprintCheck
from .class_folder import adapter_name, save_adapter, save_adapter_tensors
from .class_rows import ClassRows, adapters_enabled
from .put_into_model import put_adapter
from .untrusted_adapter import SavedAdapter, brief, exact_targets, method
from .untrusted_bank import SavedBank


class _Turn:
    """A lock for one thread at a time, since threads share the model and its adapters. A copy has its own lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __reduce__(self) -> tuple:
        return _Turn, ()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait until no other thread has the lock."""
        if self._thread == threading.get_ident():
            raise RuntimeError(
                "The pipeline is at work in this thread already, so its adapters cannot change now: wait for the end of that call, or "
                "use another pipeline."
            )
        with self._lock:
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None


class ClassAdapters:
    """The adapters on one model, one for each class, all of one method.

    FunLoRA adapters are rows of a [`ClassRows`], one for each configuration. Adapters of other methods, a FunLoRA adapter with
    `modules_to_save` and all adapters loaded after such a one are adapters of a PeftModel.

    Args:
        model (`torch.nn.Module`): the base; its layers are wrapped in place while there are adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._base = FingerprintCheck(model)
        self._turn = _Turn()
        self._banks: list[ClassRows] = []
        self._peft_model: PeftModel | None = None
        # The config with which each class was loaded, and its name.
        self._configs: dict[int, PeftConfig] = {}
        self._names: dict[int, str] = {}

    @property
    def classes(self) -> dict[int, str]:
        """Ids and names of the classes, in the order in which they were loaded."""
        return dict(self._names)

    def add(
        self, adapter: SavedAdapter, class_label: int, class_name: str, *, ignore_base_fingerprint: bool = False
    ) -> None:
        """Load the adapter of a class that has none yet. Wait for calls that are running in other threads.

        Raises:
            BaseMismatchError: the adapter was trained for another base.
            ValueError: it has another method than the loaded adapters, or does not fit. Nothing has changed then.
        """
        found = method(adapter.config)
        loaded = method(next(iter(self._configs.values()), adapter.config))
        if found != loaded:
            raise ValueError(
                f"`source` {adapter.source!r} has an adapter of type {found}, expected {loaded}, as those loaded already: use "
                "another pipeline for it."
            )
        with self._turn.taken():
            self._check_alone()
            config = self._base.accepted(adapter.config, adapter.source, ignore=ignore_base_fingerprint)
            adapter = replace(adapter, config=config)
            try:
                self._put(adapter, class_label)
            except Exception as error:
                self._clean_up()
                raise ValueError(f"The adapter {adapter.source!r} does not fit this base: {brief(error)}") from error
            self._configs[class_label], self._names[class_label] = config, class_name

    def _put(self, adapter: SavedAdapter, class_label: int) -> None:
        config = adapter.config
        if self._peft_model is not None or not isinstance(config, FunLoraConfig) or config.modules_to_save:
            self._peft_model = put_adapter(self._peft_model or self.model, adapter, adapter_name(class_label))
            return
        tensors = adapter.tensors()
        bank = next((bank for bank in self._banks if bank.takes(adapter)), None)
        if bank is None:
            adapter.check_fits(self.model)
            exact = exact_targets(config, adapter.shapes)
            bank = ClassRows(self.model, exact, self._free_name(), beside=self._banks)
            self._banks.append(bank)
        bank.insert(tensors, class_label)

    def add_bank(self, saved: SavedBank, *, ignore_base_fingerprint: bool = False) -> None:
        """Load all classes of a bank's file; none of them may be loaded already. Errors as in [`AdapterBank.load`]."""
        with self._turn.taken():
            self._check_alone()
            config = self._base.accepted(saved.config, saved.file, ignore=ignore_base_fingerprint)
            saved = replace(saved, config=config)
            self._banks.append(ClassRows.of_file(saved, self.model, self._free_name(), beside=self._banks))
            self._configs.update(dict.fromkeys(saved.classes, config))
            self._names.update(saved.classes)

    def remove(self, class_label: int) -> None:
        """Remove the adapter of a class; modules without adapters are then the base's own again."""
        with self._turn.taken():
            holder = self._holder(class_label)
            if isinstance(holder, ClassRows):
                holder.remove(class_label)
            else:
                remove_adapters(self.model, [adapter_name(class_label)])
            del self._configs[class_label], self._names[class_label]
            self._clean_up()

    def save(self, class_label: int, folder: Path) -> None:
        """Write the adapter of a class in PEFT's format, with the id and name that it has here."""
        config, class_name = copy(self._configs[class_label]), self._names[class_label]
        if isinstance(config, FunLoraConfig):
            config.class_label, config.class_name = class_label, class_name
        holder = self._holder(class_label)
        if isinstance(holder, ClassRows):
            save_adapter_tensors(config, holder.state_dict(class_label), folder, class_name=class_name)
        else:
            save_adapter(holder, folder, adapter_name(class_label), class_label=class_label, class_name=class_name)

    @torch.no_grad()
    def merged(self, class_label: int | None) -> nn.Module:
        """Copy the model without adapters, with the adapter of a class merged into its weights; None: only the base.

        Raises:
            ValueError: an adapter that cannot be merged.
        """
        names = self._own_names()
        if class_label is None:
            model = deepcopy(self.model)
            remove_adapters(model, names)
            return model
        name, holder = adapter_name(class_label), self._holder(class_label)
        if isinstance(holder, ClassRows):
            tensors = holder.state_dict(class_label)
            model = self.merged(None)
            # The start values of the adapter must not use the caller's random numbers.
            with torch.random.fork_rng(devices=[]):
                peft_model = PeftModel(model, deepcopy(exact_targets(holder.config, tensors)), adapter_name=name)
            set_peft_model_state_dict(peft_model, tensors, name)
        else:
            # Merge the layers themselves, not a saved copy: some methods change the base at their start.
            peft_model = deepcopy(holder)
            remove_adapters(without_peft(peft_model), names - {name})
        peft_model.set_adapter(name)
        try:
            return peft_model.merge_and_unload(safe_merge=True)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"The adapter of class {class_label} cannot be merged: {error}") from error

    @contextmanager
    def acting(self, class_labels: Sequence[int | None]) -> Iterator[None]:
        """Run each sample of a batch through the adapter of its class, or through the base (None). Other threads wait.

        Args:
            class_labels: the class of every sample. Batches sorted by class run fastest.
        """
        wanted = [label for label in class_labels if label is not None]
        with self._turn.taken():
            names = {label: adapter_name(label) for label in wanted}
            for bank in self._banks:
                names |= bank.place([label for label in wanted if label in bank])
            batch = [BASE if label is None else names[label] for label in class_labels]
            with adapters_enabled(self.model), self._batch(batch), cached_weights(self.model):
                yield

    def _own_names(self) -> set[str]:
        return {adapter_name(label) for label in self._configs}.union(*(bank.adapter_names for bank in self._banks))

    def _check_alone(self) -> None:
        """Raise a ValueError if the model has adapters from elsewhere, such as from a pipeline that shares it."""
        others = sorted(adapter_names_in(self.model) - self._own_names())
        if others:
            raise ValueError(
                f"The U-Net has the adapters {', '.join(others)} of another pipeline or of other code: unload them there, or give each "
                "pipeline a U-Net of its own (`copy.deepcopy`)."
            )

    def _batch(self, names: list[str]) -> AbstractContextManager:
        if self._peft_model is None or isinstance(self._peft_model.base_model, AdapterModel):
            return mixed_batch(self.model, names)
        return self._peft_model._enable_peft_forward_hooks(adapter_names=names)

    def _holder(self, class_label: int) -> ClassRows | PeftModel:
        holder = next((bank for bank in self._banks if class_label in bank), self._peft_model)
        if holder is None:
            raise KeyError(class_label)
        return holder

    def _clean_up(self) -> None:
        """Remove what no class needs any more from the model."""
        for bank in self._banks:
            if not len(bank):
                bank.unload()
        self._banks = [bank for bank in self._banks if len(bank)]
        if all(any(label in bank for bank in self._banks) for label in self._configs):
            self._peft_model = None

    def _free_name(self) -> str:
        used = {bank.adapter_name for bank in self._banks}
        return next(name for number in count() if (name := f"bank{number}") not in used)
