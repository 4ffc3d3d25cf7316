"""What the page does: loads a pipeline, adds and removes classes, makes pictures."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from PIL import ImageDraw, ImageFont

from funlora_hf import FunLoraPipeline
from funlora_hf.adapters.class_folder import ADAPTERS_FOLDER, adapter_class, adapter_folders
from funlora_hf.adapters.untrusted_adapter import ADAPTER_FILES, fetch


TILE = 64
_GAP = 4
_FONT_SIZE = 16
_LABEL_LENGTH = 20


@dataclass
class Picture:
    """
    Args:
        image: all images side by side, with labels.
        images: how many there are.
        seconds: that sampling took.
        nfe: number of function evaluations: how often the U-Net ran.
    """

    image: PIL.Image.Image
    images: int
    seconds: float
    nfe: int


class Studio:
    """One pipeline, empty at first. Not for several threads at a time. Where a method raises, nothing has changed."""

    def __init__(self) -> None:
        self._pipe: FunLoraPipeline | None = None

    @property
    def classes(self) -> dict[int, str]:
        """Every class that can be asked for, id -> name, the base's first."""
        return {} if self._pipe is None else self._pipe.classes

    @property
    def added_classes(self) -> dict[int, str]:
        """The classes of adapters: those that can be removed."""
        base = [] if self._pipe is None else self._pipe.base_classes
        return {class_id: name for class_id, name in self.classes.items() if class_id not in base}

    def load(self, base: str, adapters: str = "") -> None:
        """
        Take another base, and adapters with it, in place of what was there.

        Args:
            base (`str`): folder of a run or of a pipeline, or a repository on the Hub. A run's adapters come with it.
            adapters (`str`, *optional*): folder or repository with `class_<id>` or `adapters/class_<id>` in it.

        Raises:
            ValueError: no base, no adapters where some were asked for, or some that do not fit.
            OSError: no such folder or repository, or it cannot be reached.
        """
        base, adapters = base.strip(), adapters.strip()
        if not base:
            raise ValueError("`base` is empty, expected a folder of a run or a pipeline, or a repository on the Hub.")
        run = Path(base) / "base"
        if (run / "model_index.json").is_file():
            base, adapters = os.fspath(run), adapters or base
        pipe = FunLoraPipeline.from_pretrained(base)
        pipe.set_progress_bar_config(disable=True)
        for folder in _adapter_folders(adapters) if adapters else []:
            pipe.load_adapter(folder, **adapter_class(folder))
        self._pipe = pipe.to("cuda") if torch.cuda.is_available() else pipe

    def add_class(
        self, source: str, *, subfolder: str = "", class_label: int | None = None, class_name: str = ""
    ) -> int:
        """
        Add the class of an adapter while everything runs, see [`FunLoraPipeline.load_adapter`].

        Args:
            source (`str`): folder or repository of one adapter.
            subfolder (`str`, *optional*): where in it the adapter lies.
            class_label (`int`, *optional*): None: the adapter's own.
            class_name (`str`, *optional*): empty: the adapter's own.

        Returns:
            `int`: id of the class.

        Raises:
            ValueError: no such adapter, an id or a name that is taken, or an adapter that does not fit.
            OSError: it cannot be read or reached.
        """
        source, subfolder, class_name = source.strip(), subfolder.strip(), class_name.strip()
        if not source:
            raise ValueError("`source` is empty, expected a folder or a repository of an adapter.")
        wanted = {"class_label": class_label, "class_name": class_name or None}
        folder = Path(source, subfolder)
        # Methods other than FunLoRA write the class on the folder only.
        if folder in adapter_folders(folder.parent):
            own = adapter_class(folder)
            wanted = {key: own[key] if value is None else value for key, value in wanted.items()}
        return self._ready.load_adapter(source, subfolder=subfolder or None, **wanted)

    def remove_class(self, class_label: int | None) -> str:
        """Forget the class of an adapter; returns its name. Raises a ValueError where no adapter was loaded for it."""
        name = self.classes.get(class_label, "")
        self._ready.unload_adapter(class_label)
        return name

    def sample(self, class_labels: Sequence[int], *, images: int, steps: int, solver: str, seed: int) -> Picture:
        """
        Images of every class, one row for each.

        Args:
            class_labels (`Sequence[int]`): ids.
            images (`int`): of each class.
            steps (`int`): of the solver.
            solver (`str`): its name.
            seed (`int`): of the noise.

        Raises:
            ValueError: no class, an unknown class or solver, less than one image or step.
        """
        pipe, labels = self._ready, list(class_labels)
        if not labels:
            raise ValueError("`class_labels` is empty, expected at least one class.")
        if images < 1:
            raise ValueError(f"`images` is {images}, expected at least 1.")
        asked = [label for label in labels for _ in range(images)]
        start = time.perf_counter()
        output = pipe(asked, steps, solver, generator=_generator(seed))
        seconds = time.perf_counter() - start
        names = [self.classes[label] for label in labels]
        return Picture(draw_grid(output.images, columns=images, rows=names), len(asked), seconds, output.nfe)

    def interpolate(self, first: int, second: int, *, images: int, steps: int, solver: str, seed: int) -> Picture:
        """
        Images on the way from one class to another, from one noise.

        Args:
            first (`int`): id of the class to start at.
            second (`int`): id of the class to end at.
            images (`int`): how many, both ends included.
            steps (`int`): of the solver.
            solver (`str`): its name.
            seed (`int`): of the noise.

        Raises:
            ValueError: no class, an unknown class or solver, less than two images or one step.
        """
        pipe = self._ready
        if first is None or second is None:
            raise ValueError("`first` or `second` is empty, expected two classes.")
        start = time.perf_counter()
        output = pipe.interpolate(first, second, images, steps, solver, generator=_generator(seed))
        seconds = time.perf_counter() - start
        weights = [f"{100 * index / (images - 1):.0f}%" for index in range(images)]
        return Picture(draw_grid(output.images, columns=images, headings=weights), images, seconds, output.nfe)

    @property
    def _ready(self) -> FunLoraPipeline:
        if self._pipe is None:
            raise ValueError("No base is loaded yet: name a folder or a repository under `Model` and load it.")
        return self._pipe


def draw_grid(
    images: Sequence[PIL.Image.Image], *, columns: int, rows: Sequence[str] = (), headings: Sequence[str] = ()
) -> PIL.Image.Image:
    """
    One picture of many: small images enlarged by a whole factor to at least 64 pixels, every pixel a square.

    Args:
        images (`Sequence[PIL.Image.Image]`): of one size, row after row.
        columns (`int`): images in a row.
        rows (`Sequence[str]`, *optional*): a label to the left of every row.
        headings (`Sequence[str]`, *optional*): a label over every column.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    factor = max(1, math.ceil(TILE / max(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    font = ImageFont.load_default(_FONT_SIZE)
    rows = [name if len(name) <= _LABEL_LENGTH else name[: _LABEL_LENGTH - 1] + "…" for name in rows]
    left = max((math.ceil(font.getlength(name)) + 3 * _GAP for name in rows), default=_GAP)
    top = _FONT_SIZE + 3 * _GAP if headings else _GAP
    count = math.ceil(len(images) / columns)
    size = (left + columns * (width + _GAP), top + count * (height + _GAP))
    canvas = PIL.Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for index, image in enumerate(images):
        place = (left + index % columns * (width + _GAP), top + index // columns * (height + _GAP))
        canvas.paste(image.resize((width, height), PIL.Image.Resampling.NEAREST), place)
    for row, name in enumerate(rows):
        draw.text((left - 2 * _GAP, top + row * (height + _GAP) + height / 2), name, "black", font, anchor="rm")
    for column, name in enumerate(headings):
        draw.text((left + column * (width + _GAP) + width / 2, top / 2), name, "black", font, anchor="mm")
    return canvas


def _adapter_folders(source: str) -> list[Path]:
    names = [f"class_*/{file}" for file in (*ADAPTER_FILES, "README.md")]
    root = fetch(source, [*names, *(f"{ADAPTERS_FOLDER}/{name}" for name in names)])
    folders = adapter_folders(root) or adapter_folders(root / ADAPTERS_FOLDER)
    if not folders:
        raise ValueError(f"`adapters` is {source!r}, expected `class_<id>` folders in it or in its `adapters` folder.")
    return folders


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))
