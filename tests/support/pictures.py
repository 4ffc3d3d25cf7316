"""What the tests of figures ask of a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image


LAYERS = [
    f"up_blocks.{block}.resnets.{resnet}.{layer}"
    for block in range(6)
    for resnet in range(4)
    for layer in ("conv1", "conv2", "conv_shortcut")
][:70]


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def check(path):
    """A PNG with more than one colour, and nothing left beside it."""
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    found = pixels(path)
    assert len(np.unique(found.reshape(-1, 3), axis=0)) > 1
    return found


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]
