"""What the page does for one user: loads a pipeline, teaches, adds and removes classes, makes pictures."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from diffusers import UNet2DModel
from teaching import read_images, teach

from funlora_hf import FunLoraConfig, FunLoraPipeline, save_adapter
from funlora_hf.adapters.base_fingerprint import base_tensors
from funlora_hf.adapters.class_folder import ADAPTERS_FOLDER, adapter_class, adapter_folders, adapter_name
from funlora_hf.adapters.untrusted_adapter import ADAPTER_FILES, fetch
from funlora_hf.evaluation.figures import image_grid_picture
from funlora_hf.sampling.drawing import to_uint8


# What one user may ask for at once, and keep: a page may have many.
MOST_SAMPLES = 512
MOST_CLASSES = 100
MOST_NAME_CHARACTERS = 40
# In a row of the picture of a class that was taught.
SHOWN = 10
CLASS_EMBEDDING = "class_embedding"


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


@dataclass
class Taught:
    """
    Args:
        class_label: id of the new class.
        picture: its images as the base takes them, and samples of the new class below.
        archive: a zip file with the folder `class_<id>`, which `load_adapter` takes.
        steps: that it was trained for.
        seconds: that this took.
        numbers: that were learned.
    """

    class_label: int
    picture: PIL.Image.Image
    archive: Path
    steps: int
    seconds: float
    numbers: int


class Studio:
    """One pipeline, empty at first. Not for several threads at a time. Where a method raises, nothing has changed."""

    def __init__(self) -> None:
        self.base = ""
        self._pipe: FunLoraPipeline | None = None
        # Of the classes that came after loading; the folder is removed with the object.
        self._own: set[int] = set()
        self._archives = tempfile.TemporaryDirectory(prefix="funlora-space-")

    def session(self) -> Studio:
        """One for another user: it shares the base's weights, which never change, and has classes of its own."""
        other = Studio()
        other.base = self.base
        if self._pipe is not None:
            shared = base_tensors(self._pipe.unet).values()
            other._pipe = copy.deepcopy(self._pipe, {id(tensor): tensor for tensor in shared})
        return other

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
        self.base, self._own = base, set()

    def preview(self, files: Sequence[str]) -> PIL.Image.Image:
        """The first of some images as the base takes them. Raises a ValueError as `teach` does."""
        return image_grid_picture(_first(read_images(files, self._ready.unet)), columns=SHOWN, names=["your images"])

    def teach(
        self,
        files: Sequence[str],
        class_name: str,
        *,
        steps: int,
        seed: int,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Taught:
        """
        Learn a class from images: a new adapter, on the base as it is.

        Args:
            files (`Sequence[str]`): image files of the class.
            class_name (`str`): a name that no class has.
            steps (`int`): most steps.
            seed (`int`): of the training and of the samples shown.
            on_step (`Callable`, *optional*): gets the number of each step that is done.

        Raises:
            ValueError: no name, one that is taken or too long, no image, or a file that is none.
        """
        pipe, class_name = self._ready, class_name.strip()
        if not class_name:
            raise ValueError("The name of the class is empty: give it one, such as 'cat'.")
        if len(class_name) > MOST_NAME_CHARACTERS:
            raise ValueError(f"The name has {len(class_name)} characters, expected at most {MOST_NAME_CHARACTERS}.")
        if class_name in self.classes.values():
            raise ValueError(f"A class with the name {class_name!r} is here already: take another name, or remove it.")
        self._check_room()
        images = read_images(files, pipe.unet)
        label = max([*self.classes, -1]) + 1
        config = FunLoraConfig(
            class_label=label,
            class_name=class_name,
            class_embedding=CLASS_EMBEDDING if pipe.base_classes else None,
        )
        start = time.perf_counter()
        model, taken = teach(_plain_unet(pipe, self.base), images, config, steps=steps, seed=seed, on_step=on_step)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, adapter_name(label))
            save_adapter(model, folder)
            pipe.load_adapter(folder)
            self._own.add(label)
            try:
                samples = pipe([label] * SHOWN, generator=_generator(seed), output_type="pt").images
                archive = shutil.make_archive(os.fspath(self._archive(label).with_suffix("")), "zip", place)
            except Exception:
                self.remove_class(label)
                raise
        shown = torch.cat([_first(images), to_uint8(samples.cpu())])
        picture = image_grid_picture(shown, columns=SHOWN, names=["your images", "samples"])
        numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return Taught(label, picture, Path(archive), taken, seconds, numbers)

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
        self._check_room()
        wanted = {"class_label": class_label, "class_name": class_name or None}
        folder = Path(source, subfolder)
        # Methods other than FunLoRA write the class on the folder only.
        if folder in adapter_folders(folder.parent):
            own = adapter_class(folder)
            wanted = {key: own[key] if value is None else value for key, value in wanted.items()}
        label = self._ready.load_adapter(source, subfolder=subfolder or None, **wanted)
        self._own.add(label)
        return label

    def remove_class(self, class_label: int | None) -> str:
        """Forget the class of an adapter; returns its name. Raises a ValueError where no adapter was loaded for it."""
        name = self.classes.get(class_label, "")
        self._ready.unload_adapter(class_label)
        self._own.discard(class_label)
        self._archive(class_label).unlink(missing_ok=True)
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
        if len(labels) * images > MOST_SAMPLES:
            raise ValueError(f"{len(labels)} x {images} images are more than {MOST_SAMPLES}: choose fewer.")
        asked = [label for label in labels for _ in range(images)]
        start = time.perf_counter()
        output = pipe(asked, steps, solver, generator=_generator(seed), output_type="pt")
        seconds = time.perf_counter() - start
        names = [title(label, self.classes) for label in labels]
        picture = image_grid_picture(to_uint8(output.images.cpu()), columns=images, names=names)
        return Picture(picture, len(asked), seconds, output.nfe)

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
        output = pipe.interpolate(first, second, images, steps, solver, generator=_generator(seed), output_type="pt")
        seconds = time.perf_counter() - start
        weights = [f"{100 * index / (images - 1):.0f}%" for index in range(images)]
        picture = image_grid_picture(to_uint8(output.images.cpu()), columns=images, headings=weights)
        return Picture(picture, images, seconds, output.nfe)

    def _archive(self, class_label: int) -> Path:
        return Path(self._archives.name, f"{adapter_name(class_label)}.zip")

    def _check_room(self) -> None:
        if len(self._own) >= MOST_CLASSES:
            raise ValueError(f"You have added {len(self._own)} classes, at most {MOST_CLASSES} are kept: remove one.")

    @property
    def _ready(self) -> FunLoraPipeline:
        if self._pipe is None:
            raise ValueError("No base is loaded yet: name a folder or a repository under `Model` and load it.")
        return self._pipe


def title(class_id: int, classes: Mapping[int, str]) -> str:
    """A class as the page writes it: its id, and its name if it has one."""
    name = classes[class_id]
    return name if name == str(class_id) else f"{class_id}: {name}"


def _plain_unet(pipe: FunLoraPipeline, name: str) -> UNet2DModel:
    """A U-Net without adapters that shares the weights of a pipeline's, frozen."""
    with torch.device("meta"):
        unet = UNet2DModel.from_config(pipe.unet.config)
    unet.load_state_dict(base_tensors(pipe.unet), assign=True)
    # PEFT takes the base's name, which goes into the adapter's config, from here.
    unet.name_or_path = name
    return unet.requires_grad_(False)


def _first(images: torch.Tensor) -> torch.Tensor:
    """As many images as a row shows, the rest white."""
    white = images.new_full((max(0, SHOWN - len(images)), *images.shape[1:]), 255)
    return torch.cat([images[:SHOWN], white])


def _adapter_folders(source: str) -> list[Path]:
    names = [f"class_*/{file}" for file in (*ADAPTER_FILES, "README.md")]
    root = fetch(source, [*names, *(f"{ADAPTERS_FOLDER}/{name}" for name in names)])
    folders = adapter_folders(root) or adapter_folders(root / ADAPTERS_FOLDER)
    if not folders:
        raise ValueError(f"`adapters` is {source!r}, expected `class_<id>` folders in it or in its `adapters` folder.")
    return folders


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))
