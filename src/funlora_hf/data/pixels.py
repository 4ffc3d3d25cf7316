"""Convert the pixels of a decoded image for the models."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps


def to_array(image: Image.Image, *, size: int, channels: int) -> np.ndarray:
    """Convert one image to uint8 (channels, size, size), values 0..255."""
    image = _to_eight_bits(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # If the alpha channel were dropped instead, the colours under transparent pixels would show.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = image.convert("L" if channels == 1 else "RGB")
    # Scale the shorter side to `size` and keep the centre; an image of this size is copied unchanged.
    image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits to 0..255; convert("L") would clip it at 255.

    The scale must be the same for all images, so only the mode decides it: "I;16" and "I" (in which Pillow may open a
    16-bit file) have 0..65535, "F" has 0..1.
    """
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return image
    values = np.array(image, dtype=np.float64)
    limit = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= limit):
        raise ValueError(
            f"its values are in {values.min()}..{values.max()}, but an image of mode {image.mode!r} must hold "
            f"0..{limit}"
        )
    # In place: a large image takes 8 bytes per pixel here.
    values *= 255 / limit
    return Image.fromarray(np.round(values, out=values).astype(np.uint8))


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 0..255 of any shape to float32 in [-1, 1], the range of generator and classifier."""
    return images.float() / 127.5 - 1
