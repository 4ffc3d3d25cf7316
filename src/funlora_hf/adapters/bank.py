"""AdapterBank: any number of classes stored as rows of numbers, one of them live in a model at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..tuner import FunLoraConfig, mixed_batch
from ..tuner_base.layer import BASE
from ..utils.files import write_tensors
from .base_fingerprint import FingerprintCheck
from .class_folder import adapter_folders, known_class
from .class_folder import adapter_name as class_adapter_name
from .class_rows import ClassRows, adapters_enabled
from .untrusted_adapter import ADAPTER_FILES, bankable, exact_targets, fetch, read_adapter
from .untrusted_bank import METADATA, ROWS, read_bank
from .untrusted_base import check_names_differ, load_base


class AdapterBank(ClassRows):
    """Many FunLoRA adapters of one configuration for one model; one of them is live.

    With PEFT, the model has an adapter for every class, and each of them takes time whenever one is added or activated.
    Here the model has one adapter, and a class is one row of numbers: activating it is one copy, however many classes there
    are, a compiled model stays compiled, and a thousand classes load from one file. For a batch of several classes
    (`mixed_batch`) the model gets one more adapter for each class in the batch.

    Args:
        model (`torch.nn.Module`): The base, such as a `UNet2DModel`; its layers are wrapped in place. Or a model that has
            this adapter already.
        config (`FunLoraConfig`): Config of the adapters, without `modules_to_save`.
        adapter_name (`str`, *optional*, defaults to `"live"`): name of the one adapter in the model.

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

    def __init__(self, model: nn.Module, config: FunLoraConfig, adapter_name: str = "live") -> None:
        super().__init__(model, config, adapter_name)
        self._live = adapter_name
        self._base = FingerprintCheck(self.model)
        self._names: dict[int, str] = {}
        self._active: int | None = None

    @property
    def classes(self) -> dict[int, str]:
        """Ids and names of the classes in the bank, in the order in which they were added."""
        return {label: self._names.get(label, str(label)) for label in self._rows}

    @property
    def active(self) -> int | None:
        """The live class; None: the base."""
        return self._active

    def activate(self, class_label: int | None) -> None:
        """Make a class live in the model, or the base, with None.

        It takes one copy of a few kilobytes, independent of the number of classes. Do not call it between a forward and its
        backward.

        Raises:
            ValueError: a class that is not in the bank or has numbers that are not finite, or a live adapter that is merged
                into the base's weights. Nothing has changed then.
        """
        self._check_unmerged()
        if class_label is not None:
            self._fill(self.adapter_name, self._finite_row(class_label))
        self._switch(self._layers, on=class_label is not None)
        self._active = class_label

    @contextmanager
    def mixed_batch(self, class_labels: Sequence[int | None]) -> Iterator[None]:
        """Run each sample of a batch through the adapter of its class, as the function `mixed_batch` does for adapters by name.

        Args:
            class_labels (`Sequence[int | None]`): the class of every sample; None: the base. Batches sorted by class run fastest.

        Raises:
            ValueError: as `activate`, or a batch of another length.
        """
        placed = self.place([label for label in class_labels if label is not None])
        names = [BASE if label is None else placed[label] for label in class_labels]
        with adapters_enabled(self.model), mixed_batch(self.model, names):
            yield

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
        """Add the class of a saved adapter. Only its JSON and its safetensors file are read.

        Args:
            source, subfolder, revision, class_label, class_name, local_files_only, ignore_base_fingerprint: as in
                [`FunLoraPipeline.load_adapter`].

        Returns:
            `int`: the id of the class.

        Raises:
            BaseMismatchError: the adapter was trained for another base.
            ValueError: no id, an id or name that is taken, a configuration that differs from the bank's, or tensors that are missing,
                unexpected, of another shape or not finite. The bank has not changed then.
            FileNotFoundError: a folder without an adapter, or no such repository.
        """
        adapter = read_adapter(source, subfolder=subfolder, revision=revision, local_files_only=local_files_only)
        config = bankable(adapter.config, repr(adapter.source))
        self._check_shared(config, adapter.source)
        class_label, class_name = known_class(config, adapter.source, class_label, class_name)
        if not ignore_base_fingerprint:
            self._base.check(config, adapter.source)
        check_names_differ({**self.classes, class_label: class_name})
        self.insert(adapter.tensors(), class_label, f"The tensors of {adapter.source!r}")
        if ignore_base_fingerprint:
            self.config = self._base.accepted(self.config, adapter.source, ignore=True)
        self._names[class_label] = class_name
        return class_label

    def add_tensors(
        self, state_dict: Mapping[str, torch.Tensor], *, class_label: int, class_name: str | None = None
    ) -> int:
        """Add a class by its tensors, as PEFT saves them: what `get_peft_model_state_dict` gives.

        Args and errors are those of `add`.
        """
        unnamed = replace(self.config, class_label=None, class_name=None)
        class_label, class_name = known_class(unnamed, "state_dict", class_label, class_name)
        check_names_differ({**self.classes, class_label: class_name})
        self.insert(state_dict, class_label)
        self._names[class_label] = class_name
        return class_label

    def remove(self, class_label: int) -> None:
        """Remove a class; if it was live, the base is live then. Raises a ValueError if there is no such class."""
        if self._active == class_label:
            self.activate(None)
            self._clear(self.adapter_name)
        super().remove(class_label)
        self._names.pop(class_label, None)

    def save(self, file: str | os.PathLike) -> None:
        """Write all classes into one safetensors file, which appears whole or not at all."""
        layout = [[key, list(shape)] for key, shape in zip(self._parts, self._shapes, strict=True)]
        # One entry, since safetensors writes several entries in any order, and equal banks should give equal files.
        metadata = {
            METADATA: json.dumps(
                {"config": self.config.to_dict(), "layout": layout, "classes": list(self.classes.items())}
            )
        }
        rows = [row.cpu() for row in self._rows.values()]
        table = torch.stack(rows) if rows else torch.empty(0, sum(shape.numel() for shape in self._shapes))
        write_tensors(Path(file), {ROWS: table}, metadata=metadata)

    @classmethod
    def load(
        cls,
        file: str | os.PathLike,
        model: nn.Module,
        adapter_name: str = "live",
        *,
        ignore_base_fingerprint: bool = False,
    ) -> AdapterBank:
        """Load a bank from a file that `save` wrote. The rows stay in the file, which is mapped into memory, until they are used.

        Args:
            file (`str` or `os.PathLike`): the file; it must not change while the bank is in use.
            model (`torch.nn.Module`): the base that the adapters were trained for.
            adapter_name, ignore_base_fingerprint: as for the class and in `add`.

        Raises:
            BaseMismatchError: the adapters were trained for another base.
            ValueError: not a bank's file, or it does not fit the model; the error names the tensors.
            FileNotFoundError: no such file.
        """
        saved = read_bank(file)
        config = FingerprintCheck(model).accepted(saved.config, saved.file, ignore=ignore_base_fingerprint)
        bank = cls.of_file(replace(saved, config=config), model, adapter_name)
        bank._names = dict(saved.classes)
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
        """Make a bank of the classes in a repository that has a folder `class_<id>` for each, as `push_all` writes it.

        Args:
            source (`str` or `os.PathLike`): the repository, or a folder with the same layout.
            model (`torch.nn.Module`, *optional*): the base; None: load the U-Net that the adapters' configs name.
            classes (collection of `int`, *optional*): ids of the classes to fetch; None: all.
            revision, local_files_only, ignore_base_fingerprint: as in `add`.

        Returns:
            [`AdapterBank`], on `bank.model`.

        Raises:
            BaseMismatchError: an adapter was trained for another base.
            ValueError: no `model`, and the configs name none that can be loaded; adapters of several configurations; or as `add`.
                The model is unchanged then.
            FileNotFoundError: no such repository, or a class that it does not have.
        """
        names = ["class_*"] if classes is None else [class_adapter_name(label) for label in classes]
        files = [f"{name}/{file}" for name in names for file in ADAPTER_FILES]
        root = fetch(source, files, revision=revision, local_files_only=local_files_only)
        folders = adapter_folders(root) if classes is None else [root / name for name in names]
        if not folders:
            raise FileNotFoundError(f"{os.fspath(source)!r} has no folder class_<id>, expected one for each class.")
        first = read_adapter(folders[0])
        config = bankable(first.config, repr(os.fspath(source)))
        base = load_base(config, local_files_only=local_files_only) if model is None else model
        config = FingerprintCheck(base).accepted(config, first.source, ignore=ignore_base_fingerprint)
        first.check_fits(base)
        bank = cls(base, exact_targets(config, first.shapes))
        try:
            for folder in folders:
                bank.add(folder, ignore_base_fingerprint=ignore_base_fingerprint)
        except Exception:
            bank.unload()
            raise
        return bank
