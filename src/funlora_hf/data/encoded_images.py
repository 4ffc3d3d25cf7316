"""Decodes images that anybody may have written, after a look at their headers."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps

from ..utils.checks import shortened


# A frame of 8K video has 33.2 million. A file of some bytes can say that it has billions, and decoding takes up to 16 bytes each.
MOST_PIXELS = 2**25
# Some of Pillow's others start another program (EPS) or hold an image of another size than their header says (ICO).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def decode_image(encoded: Mapping[str, Any]) -> Image.Image:
    """Decode an image in a file on this machine or in bytes, and turn it as its EXIF orientation says.

    The header is checked before anything is decoded. No other program is started and no address is requested.

    Args:
        encoded: "bytes", or None and "path", as `datasets` keeps an image undecoded.

    Raises:
        ValueError: no file, another format than `FORMATS`, or its header has no size, or one of more than `MOST_PIXELS`.
        OSError: Pillow finds no image in it.
        Exception: what else Pillow's formats raise.
    """
    content, path = encoded.get("bytes"), encoded.get("path")
    source: str | io.BytesIO
    if content is not None:
        source = io.BytesIO(content)
    elif path and "\0" not in path and os.path.isfile(path):
        source = path
    else:
        raise ValueError(f"its file is {shortened(repr(path), 200)}, which is no file on this machine")
    with warnings.catch_warnings():
        # Our limit is lower.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(source)
    with image:
        if image.format not in FORMATS:
            raise ValueError(f"it is of format {image.format}, expected one of {', '.join(FORMATS)}: convert it")
        width, height = image.size
        if not (width > 0 and height > 0 and width * height <= MOST_PIXELS):
            raise ValueError(f"it has {width} x {height} pixels, expected 1 to {MOST_PIXELS}: scale it down")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
