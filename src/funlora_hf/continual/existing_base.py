"""A generator that exists already, and the classes it knows. Reads folders."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import UNet2DModel

from ..adapters.base_model import base_classes, check_base_folder
from ..adapters.class_folder import ADAPTERS_FOLDER, adapter_class, adapter_folders
from ..sampling.pipeline import FunLoraPipeline
from ..utils.checks import check_at_least_one


@dataclass(frozen=True)
class ExistingBase:
    """
    Args:
        folder: pipeline folder on this machine.
        source: how others find its U-Net: the folder's `unet/`, or the repository.
        classes: id -> name of every class known, by the base's rows and by adapters.
        image_size: edge of its images in pixels.
        channels: of its images.
    """

    folder: Path
    source: str
    classes: dict[int, str]
    image_size: int
    channels: int

    def with_adapters(self, adapters: Path) -> ExistingBase:
        """The same, also knowing the classes of the adapters below a folder."""
        return replace(self, classes={**self.classes, **_adapter_classes(adapters)})


def find_base(name: str, *, revision: str | None = None) -> ExistingBase:
    """Look at the base that `base_model` names.

    Args:
        name: a pipeline folder, or a repository on the Hub, which is downloaded.
        revision: branch, tag or commit of a repository.

    Raises:
        FileNotFoundError: no such folder, or no pipeline in it.
        ValueError: its U-Net has no class embedding.
    """
    local = Path(name)
    if local.is_dir():
        folder, source = local, os.fspath(local / "unet")
    elif name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"`base_model` is {name!r}, but there is no such folder.")
    else:
        folder, source = Path(FunLoraPipeline.download(name, revision=revision)), name
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"`base_model` is {name!r}, expected a pipeline folder with a model_index.json, such as the base/ folder of "
            "a run."
        )
    check_base_folder(folder)
    config = UNet2DModel.load_config(folder, subfolder="unet")
    for name in ("sample_size", "in_channels"):
        check_at_least_one(name, config.get(name))
    if not config.get("num_class_embeds"):
        raise ValueError(
            f"`base_model` {name!r} has a U-Net without a class embedding (`num_class_embeds`), which class vectors "
            "stand in for: train a class-conditional base."
        )
    base = ExistingBase(folder, source, base_classes(folder), config["sample_size"], config["in_channels"])
    return base.with_adapters(folder / ADAPTERS_FOLDER)


def _adapter_classes(adapters: Path) -> dict[int, str]:
    classes = {}
    for folder in adapter_folders(adapters):
        found = adapter_class(folder)
        classes[found["class_label"]] = found["class_name"] or str(found["class_label"])
    return classes
