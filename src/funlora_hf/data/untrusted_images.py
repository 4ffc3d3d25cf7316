"""Decode untrusted images, after a check of their headers."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..utils.checks import shortened


# A frame of 8K video has 33.2 million. A small file can claim billions, and decoding takes up to 16 bytes per pixel.
MOST_PIXELS = 2**25
# Some other formats of Pillow start another program (EPS) or hold an image whose size differs from their header's (ICO).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def check_inside(path: str | None, roots: Sequence[str]) -> Path:
    """Return the file that a row names. Links in the folders of a dataset may lead out of it; names may not.

    Raises:
        ValueError: there is no such file on this machine, or it is outside of the folders of the dataset.
    """
    if not path or "\0" in path or not os.path.isfile(path):
        raise ValueError(f"its file is {shortened(repr(path), 200)}, which is no file on this machine")
    place = Path(os.path.abspath(path))
    if not any(place.is_relative_to(os.path.abspath(root)) for root in roots):
        raise ValueError(f"its file is {shortened(repr(path), 200)}, which is outside of the dataset")
    return place


def decode_image(encoded: Mapping[str, Any], *, roots: Sequence[str]) -> Image.Image:
    """Decode an image from a local file or from bytes, and apply its EXIF orientation.

    The header is checked before anything is decoded. No other program is started and no address is requested. Of several frames, the
    first is read, and `info["has_more_frames"]` says so.

    Args:
        encoded: "bytes", or None and "path", as `datasets` keeps an image undecoded.
        roots: folders that may contain the file.

    Raises:
        ValueError: no file in `roots`, a format other than `FORMATS`, or a header without a size or with more than
            `MOST_PIXELS`.
        OSError: Pillow finds no image in it.
        Exception: any other error of Pillow's formats.
    """
    content, path = encoded.get("bytes"), encoded.get("path")
    source = io.BytesIO(content) if content is not None else check_inside(path, roots)
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
        # Pillow seeks for the answer, which it cannot once it has decoded. Others in an MPO are previews and depth maps.
        image.info["has_more_frames"] = image.format != "MPO" and getattr(image, "is_animated", False)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
