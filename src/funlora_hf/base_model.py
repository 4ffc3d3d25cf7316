"""The base that an adapter's config names, loaded. Knows diffusers' folders and the Hub; knows no adapters' tensors."""

from __future__ import annotations

from diffusers import UNet2DModel
from peft import PeftConfig


UNET_FOLDER = "unet"


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
