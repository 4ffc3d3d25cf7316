"""Pictures in a folder: which there are, and their pixels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.image_folder import is_image, warn_of_links
from ..data.pixels import to_array
from ..data.untrusted_images import decode_image
from ..utils.checks import shortened


# Of a text beside pictures.
MOST_BYTES = 2**24


def load_images(paths: Sequence[Path], *, size: int) -> torch.Tensor:
    """Decode pictures to uint8 `(n, 3, size, size)`, n >= 1: the shorter side is resized, the centre kept.

    Raises:
        ValueError: a file is no picture; the error names it.
    """
    pixels, several = [], []
    for path in paths:
        try:
            image = decode_image({"path": os.fspath(path)}, roots=[str(path.parent)])
            several += [path] * image.info["has_more_frames"]
            pixels.append(to_array(image, size=size, channels=3))
        except Exception as error:  # Pillow's decoders raise many types
            raise ValueError(
                f"the picture {shortened(repr(str(path)), 300)} cannot be read ({type(error).__name__}: "
                f"{shortened(str(error), 300)}). Expected an image that Pillow can open: replace or remove it."
            ) from error
    if several:
        warnings.warn(f"{several[0]} has several frames, of which only the first is read.", stacklevel=2)
    return torch.from_numpy(np.stack(pixels))


def pictures(folder: Path, *, beside: str = "") -> tuple[Path, ...]:
    """Return the images in a folder, sorted. Warn about links that lead out of it, and about what is left out.

    `beside`: extension of files that belong to the images.
    """
    found = sorted(one for one in folder.iterdir() if not one.name.startswith((".", "__")))
    images = tuple(one for one in found if is_image(one) and one.is_file())
    others = [one.name for one in found if one not in images and not (beside and one.suffix == beside)]
    if others and images:
        warnings.warn(
            f"{str(folder)!r}: {len(others)} of its entries are no images and will not be read: {shortened(', '.join(others), 300)}.",
            stacklevel=2,
        )
    warn_of_links(folder, [folder, *images])
    return images


def captions_beside(images: Sequence[Path]) -> dict[str, str]:
    """Return the captions of the pictures that have one, by name: the text of `a.txt` for `a.jpg`."""
    texts = {path.name: path.with_suffix(".txt") for path in images}
    return {name: read_text(text).strip() for name, text in texts.items() if text.is_file()}


def read_text(file: Path) -> str:
    """Read a small text file.

    Raises:
        ValueError: it cannot be read, is no text, or is too long; the error names it.
    """
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as text: {error}.") from error
    if len(text) > MOST_BYTES:
        raise ValueError(f"{str(file)!r} has more than {MOST_BYTES} characters.")
    return text
