"""Adapters written by an earlier version give the images that they gave then."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


FOLDER = Path(__file__).parents[1] / "fixtures" / "earlier"


def load_maker():
    spec = importlib.util.spec_from_file_location("earlier_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("unet", ["digits", "wide"])
def test_images_are_those_of_then(unet):
    make = load_maker()
    expected = load_file(FOLDER / unet / "images.safetensors")["images"]
    found = make.draw(unet, [FOLDER / unet / kind for kind in make.KINDS])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Each class has images of its own.
    for one in range(1, 5):
        assert (expected[one] - expected[1 + one % 4]).abs().max() > 0.05
