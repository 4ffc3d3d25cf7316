"""The adapters of a U-Net by class, whatever they are made of: FunLoRA's in banks, others' in a PeftModel."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy, deepcopy
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from torch import nn

from ..tuner import FunLoraConfig, mixed_batch
from ..tuners_utils.layer import BASE
from ..tuners_utils.model import AdapterModel
from ..tuners_utils.weights import cached_weights
from ..tuners_utils.wrappers import remove_adapters
from .bank import AdapterBank, adapters_enabled
from .base_fingerprint import FingerprintCheck
from .class_folder import adapter_name, save_adapter, save_adapter_tensors
from .put_into_model import put_adapter
from .untrusted_adapter import SavedAdapter, brief, exact_targets


class _Turn:
    """One thread at a time: a model has one place for what acts in it. A copy is a turn of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __reduce__(self) -> tuple:
        return _Turn, ()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait until the other threads are done."""
        if self._thread == threading.get_ident():
            raise RuntimeError(
                "The pipeline is at work in this thread already, and its adapters cannot change meanwhile: call it after that "
                "call, or use another pipeline."
            )
        with self._lock:
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None


class ClassAdapters:
    """
    Adapters on one model, one for a class.

    FunLoRA adapters lie in an [`AdapterBank`] for each configuration. Those of other methods, and FunLoRA's with
    `modules_to_save` and whatever comes after such, are adapters of a PeftModel. All are of one method.

    Args:
        model (`torch.nn.Module`): the base; its layers are wrapped in place while there are adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._base = FingerprintCheck(model)
        self._turn = _Turn()
        self._banks: dict[str, AdapterBank] = {}
        self._peft_model: PeftModel | None = None
        # What each class was loaded with, and the bank it is in, if any.
        self._configs: dict[int, PeftConfig] = {}
        self._bank_of: dict[int, AdapterBank] = {}

    def add(self, adapter: SavedAdapter, class_label: int, *, ignore_base_fingerprint: bool = False) -> None:
        """
        Load the adapter of a class, after the calls that are running in other threads.

        Args:
            adapter ([`SavedAdapter`]): as it was found.
            class_label (`int`): a class that has none yet.
            ignore_base_fingerprint (`bool`): load it also if it was trained for another base.

        Raises:
            BaseMismatchError: the adapter was trained for another base.
            ValueError: an adapter of another method than those loaded, or one that does not fit. Nothing has changed then.
        """
        self._check_method(adapter)
        with self._turn.taken():
            self._add(adapter, class_label, ignore_base_fingerprint)

    def _add(self, adapter: SavedAdapter, class_label: int, ignore_base_fingerprint: bool) -> None:
        if not ignore_base_fingerprint:
            self._base.check(adapter.config, adapter.source)
        try:
            bankable = isinstance(adapter.config, FunLoraConfig) and not adapter.config.modules_to_save
            if bankable and self._peft_model is None:
                self._add_to_bank(adapter, class_label)
            else:
                self._peft_model = put_adapter(self._model, self._peft_model, adapter, adapter_name(class_label))
        except Exception as error:
            self._clean_up()
            raise ValueError(f"The adapter {adapter.source!r} does not fit this base: {brief(error)}") from error
        self._configs[class_label] = adapter.config

    def open_bank(self, file: str | os.PathLike, *, ignore_base_fingerprint: bool = False) -> AdapterBank:
        """A bank from a file that [`AdapterBank.save`] wrote, on the model, for `add_bank`. Errors as in [`AdapterBank.load`]."""
        with self._turn.taken():
            return AdapterBank.load(
                file,
                self._model,
                self._free_name(),
                beside=list(self._banks.values()),
                ignore_base_fingerprint=ignore_base_fingerprint,
            )

    def add_bank(self, bank: AdapterBank) -> None:
        """Take in all classes of a bank from `open_bank`, none of which is loaded yet."""
        self._banks[bank.adapter_name] = bank
        self._configs.update(dict.fromkeys(bank.classes, bank.config))
        self._bank_of.update(dict.fromkeys(bank.classes, bank))

    def remove(self, class_label: int) -> None:
        """Forget the adapter of a class; modules that none is left in are the base's own again."""
        with self._turn.taken():
            bank = self._bank_of.pop(class_label, None)
            if bank is not None:
                bank.remove(class_label)
            else:
                remove_adapters(self._model, [adapter_name(class_label)])
            del self._configs[class_label]
            self._clean_up()

    def save(self, class_label: int, folder: Path, *, class_name: str) -> None:
        """Write the adapter of a class as PEFT reads it, under the id and name that it has here."""
        config = copy(self._configs[class_label])
        if isinstance(config, FunLoraConfig):
            config.class_label, config.class_name = class_label, class_name
        bank = self._bank_of.get(class_label)
        if bank is not None:
            save_adapter_tensors(config, bank.state_dict(class_label), folder, class_name=class_name)
        else:
            save_adapter(self._peft_model, adapter_name(class_label), folder, class_name=class_name)

    @torch.no_grad()
    def merged(self, class_label: int | None) -> nn.Module:
        """A copy of the model with the adapter of a class merged into its weights, and no adapters; None: of the base.

        Raises:
            ValueError: an adapter that cannot be merged.
        """
        bank = self._bank_of.get(class_label)
        held = None if class_label is None or bank is not None else adapter_name(class_label)
        names = {adapter_name(label) for label in self._configs if label not in self._bank_of}
        names |= {name for bank in self._banks.values() for name in bank.adapter_names}
        # The layers themselves are merged, not what a file of them would hold: some methods change the base as they start.
        model, peft_model = deepcopy((self._model, self._peft_model))
        remove_adapters(model, names - {held})
        if class_label is None:
            return model
        if bank is not None:
            tensors = bank.state_dict(class_label)
            # The start of an adapter must not take from the random numbers of who calls.
            with torch.random.fork_rng(devices=[]):
                config = deepcopy(exact_targets(bank.config, tensors))
                peft_model = PeftModel(model, config, adapter_name=adapter_name(class_label))
            set_peft_model_state_dict(peft_model, tensors, adapter_name(class_label))
        peft_model.set_adapter(adapter_name(class_label))
        try:
            return peft_model.merge_and_unload(safe_merge=True)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"The adapter of class {class_label} cannot be merged: {error}") from error

    @contextmanager
    def acting(self, class_labels: Sequence[int | None]) -> Iterator[None]:
        """Run each sample of a batch through the adapter of its class, None: through the base. One thread at a time does.

        Args:
            class_labels: of every sample. Sorted by class they run fastest.
        """
        with self._turn.taken(), self._adapters_of(class_labels), cached_weights(self._model):
            yield

    @contextmanager
    def _adapters_of(self, class_labels: Sequence[int | None]) -> Iterator[None]:
        if not self._configs:
            yield
            return
        names: dict[int | None, str] = {None: BASE}
        for label in class_labels:
            if label is not None and label not in self._bank_of:
                names[label] = adapter_name(label)
        for bank in self._banks.values():
            names |= bank.place([label for label in class_labels if self._bank_of.get(label) is bank])
        with adapters_enabled(self._model), self._batch([names[label] for label in class_labels]):
            yield

    def _batch(self, names: list[str]) -> AbstractContextManager:
        tuner = None if self._peft_model is None else self._peft_model.base_model
        if tuner is None or isinstance(tuner, AdapterModel):
            return mixed_batch(self._model, names)
        return tuner._enable_peft_forward_hooks(adapter_names=names)

    def _add_to_bank(self, adapter: SavedAdapter, class_label: int) -> None:
        tensors = adapter.tensors()
        bank = next((bank for bank in self._banks.values() if bank.takes(adapter)), None)
        if bank is None:
            adapter.check_fits(self._model)
            bank = AdapterBank(self._model, adapter.exact_config, self._free_name(), beside=list(self._banks.values()))
            self._banks[bank.adapter_name] = bank
        bank.add_tensors(tensors, class_label=class_label)
        self._bank_of[class_label] = bank

    def _check_method(self, adapter: SavedAdapter) -> None:
        found = adapter.config.peft_type
        loaded = next(iter(self._configs.values()), adapter.config)
        if found != loaded.peft_type:
            raise ValueError(
                f"`source` {adapter.source!r} holds an adapter of type {found.value}, expected "
                f"{loaded.peft_type.value}, as those loaded already: use a pipeline of its own."
            )

    def _clean_up(self) -> None:
        """Take off the model what no class needs any more."""
        for name, bank in list(self._banks.items()):
            if not len(bank):
                bank.unload()
                del self._banks[name]
        if self._configs.keys() == self._bank_of.keys():
            self._peft_model = None

    def _free_name(self) -> str:
        numbers = (f"bank{number}" for number in range(len(self._banks) + 1))
        return next(name for name in numbers if name not in self._banks)
