"""Bases, found and read: the one that an adapter's config names, or that in a folder.

Knows diffusers' folders and the Hub; knows no adapters' tensors.
"""

from __future__ import annotations

import os
from pathlib import Path

from diffusers import UNet2DModel
from peft import PeftConfig
from safetensors import SafetensorError

from .files import read_json


UNET_FOLDER = "unet"
PIPELINE = "model_index.json"
# Where the generator of a run lies: a strategy that trains it on after task 1 leaves another one than the base.
GENERATOR_FOLDERS = ("model", "base")


def load_base(config: PeftConfig, *, local_files_only: bool = False) -> UNet2DModel:
    """
    The U-Net that an adapter was trained for: of a pipeline's folder or repository, or one that is the U-Net itself.

    Args:
        config (`PeftConfig`): of the adapter.
        local_files_only (`bool`, *optional*, defaults to `False`): take a repository from the cache.

    Raises:
        ValueError: the config names no base, or one that cannot be loaded.
    """
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(
            "`base_model_name_or_path` is None: the adapter's config names no base. Pass `model`, its U-Net."
        )
    errors = []
    for subfolder in (UNET_FOLDER, None):
        try:
            return UNet2DModel.from_pretrained(
                name,
                subfolder=subfolder,
                revision=config.revision,
                local_files_only=local_files_only,
                use_safetensors=True,
            )
        except (OSError, ValueError) as error:
            errors.append(error)
    raise ValueError(
        f"`base_model_name_or_path` is {name!r}, from which no UNet2DModel could be loaded: {errors[0]} Pass `model`, the base's "
        "U-Net."
    )


def base_classes(folder: Path) -> dict[int, str]:
    """Names by ids of the classes that a pipeline's U-Net itself knows, by row of its class embedding.

    Raises:
        OSError: no U-Net in the folder.
        ValueError: a file that is not the JSON of a pipeline.
    """
    try:
        index = read_json(folder / PIPELINE) if (folder / PIPELINE).is_file() else {}
        rows = UNet2DModel.load_config(folder, subfolder=_unet_subfolder(folder)).get("num_class_embeds") or 0
        ids = index.get("class_ids") or list(range(rows))
        names = {int(class_id): str(name) for class_id, name in (index.get("id2label") or {}).items()}
        return {int(class_id): names.get(int(class_id), str(class_id)) for class_id in ids}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"The classes of the base {os.fspath(folder)!r} cannot be read: {error}") from error


def read_unet(folder: Path) -> UNet2DModel:
    """
    The U-Net in a folder on this machine: a pipeline's, or one that is the U-Net itself.

    Raises:
        ValueError: it cannot be loaded, or its file lacks tensors or has others; diffusers alone only warns of these.
    """
    try:
        unet, found = UNet2DModel.from_pretrained(
            folder, subfolder=_unet_subfolder(folder), use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The U-Net in {os.fspath(folder)!r} cannot be loaded: {error}") from error
    wrong = {
        name: found.get(name) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if found.get(name)
    }
    if wrong:
        listed = "; ".join(f"{name}: {', '.join(map(str, list(keys)[:5]))}" for name, keys in wrong.items())
        raise ValueError(f"The U-Net in {os.fspath(folder)!r} has not the tensors that its config makes: {listed}.")
    return unet.eval()


def _unet_subfolder(folder: Path) -> str | None:
    return UNET_FOLDER if (folder / UNET_FOLDER).is_dir() else None
