"""Benchmarks as modules, for one test each, and a U-Net small enough for it."""

import importlib
import sys

import pytest
import torch
from diffusers import UNet2DModel
from runs import REPOSITORY, TINY_UNET


BENCHMARKS = REPOSITORY / "benchmarks"
NAMES = {path.stem for path in BENCHMARKS.glob("*.py")}


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark by its name; it is imported anew, and no later test sees it or what it sets."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield importlib.import_module
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def interleaved(benchmark):
    return benchmark("interleaved")


@pytest.fixture
def small_unet():
    """Makes U-Nets that take the place of the paper's."""
    images = {"sample_size": 32, "in_channels": 3, "out_channels": 3}
    return lambda: UNet2DModel(**{**TINY_UNET, **images}, num_class_embeds=10)
