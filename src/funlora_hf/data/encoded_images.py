"""Looks at encoded images, which anybody may have written, before they are decoded."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..utils.checks import shortened


# A frame of 8K video has 33.2 million. A file of some bytes can say that it has billions, and decoding takes up to 16 bytes each.
MOST_PIXELS = 2**25
# Some of Pillow's others start another program (EPS) or hold an image of another size than their header says (ICO).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def check_encoded_image(encoded: Mapping[str, Any]) -> None:
    """
    Raise a ValueError unless an image is in a file on this machine or in bytes, and its header says that it can be decoded.

    Nothing is decoded, no other program is started, and no address is asked for.

    Args:
        encoded: "bytes", or None and "path", as `datasets` keeps an image undecoded.

    Raises:
        ValueError: no file, another format than `FORMATS`, or its header has no size, or one of more than `MOST_PIXELS`.
        OSError: Pillow finds no image in it.
        Exception: what else Pillow's formats raise for a header.
    """
    content, path = encoded.get("bytes"), encoded.get("path")
    if content is None and not (path and "\0" not in path and os.path.isfile(path)):
        raise ValueError(f"its file is {shortened(repr(path), 200)}, which is no file on this machine")
    with warnings.catch_warnings():
        # Ours is the lower limit.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            kind, (width, height) = image.format, image.size
    if kind not in FORMATS:
        raise ValueError(f"it is of format {kind}, expected one of {', '.join(FORMATS)}: convert it")
    if not (width > 0 and height > 0 and width * height <= MOST_PIXELS):
        raise ValueError(f"it has {width} x {height} pixels, expected 1 to {MOST_PIXELS}: scale it down")
