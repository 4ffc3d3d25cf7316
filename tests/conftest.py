"""What several test modules need: a small U-Net, a small pipeline, one thread, a Hub."""

from __future__ import annotations

# First, since the libraries below import huggingface_hub, which reads its environment once.
from hub_environment import HOME, SERVER


# isort: split

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils.memory
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from runs import REPOSITORY, command_line, make_tiny_unet, write_adapters

from funlora_hf import FunLoraPipeline, base_fingerprints
from funlora_hf.evaluation.label_font import drawable


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard():
    """Also where a script has started the tests in its background, in which a shell has SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _no_collection_after_phases():
    """Collecting garbage, as accelerate does after each phase, would take most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.utils.memory, "gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Bit-equality is promised for one thread count, and small tensors are fastest on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps the precision of a process's first Accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def nan_in_empty_tensors():
    """Weights that are read while they are offloaded are NaN, not by chance the right ones."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny_unet() -> UNet2DModel:
    return make_tiny_unet()


@pytest.fixture
def tiny_pipe(tiny_unet) -> FunLoraPipeline:
    pipe = FunLoraPipeline(tiny_unet, FlowMatchEulerDiscreteScheduler(), class_ids=[3, 5], id2label={3: "three"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def hub():
    """The process's Hub server, empty and without faults, and an empty cache; `hub.environment` is for subprocesses."""
    SERVER.reset()
    shutil.rmtree(HOME / "hub", ignore_errors=True)
    yield SERVER
    errors = SERVER.errors
    SERVER.reset()
    assert not errors, errors


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Lets the client retry at once, and returns the seconds it would have waited."""
    seconds: list[float] = []
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=seconds.append, time=time.time))
    return seconds


@pytest.fixture
def run_folder(tiny_pipe, tmp_path):
    """A base of 3 and 5, and adapters of 7 and 8 that carry its fingerprint."""
    fingerprint = base_fingerprints(tiny_pipe.unet)
    for label in (7, 8):
        write_adapters(
            tiny_pipe,
            tmp_path / "run",
            classes=[label],
            base=label == 7,
            class_label=label,
            class_name=f"name {label}",
            base_fingerprint=fingerprint,
        )
    return tmp_path / "run"


@pytest.fixture
def run_short_example(run_example):
    """Runs an example with the arguments of a short run, and `out` in a folder as its output; keyword arguments change them."""

    def start(example: str, short: dict, folder: Path, *arguments: str, check: bool = True, **overrides):
        given = command_line(**{**short, "output_dir": "out", **overrides})
        return run_example(*given, *arguments, cwd=folder, check=check, example=example, timeout=600)

    return start


@pytest.fixture
def run_example():
    """Runs an example in a process of its own and returns it, with its output as text."""

    def start(
        *arguments: str,
        cwd: Path,
        launcher: tuple[str, ...] = (),
        check: bool = True,
        timeout: int = 300,
        example: str = "continual_train.py",
        script: Path | None = None,
    ):
        script = REPOSITORY / "examples" / example if script is None else script
        command = [*(launcher or (sys.executable,)), str(script), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
        return done

    return start


@pytest.fixture
def saved_figures(monkeypatch):
    """The figures saved so far, to look at what is drawn."""
    module = pytest.importorskip("matplotlib.figure")
    figures = []
    savefig = module.Figure.savefig

    def record(self, *args, **kwargs):
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(module.Figure, "savefig", record)
    return figures


@pytest.fixture
def drawn_labels(monkeypatch):
    """The labels of grids drawn so far: names of rows, then of columns, then the title."""
    labels = []

    def record(label, font):
        labels.append(drawable(label, font))
        return labels[-1]

    monkeypatch.setattr("funlora_hf.evaluation.figures.drawable", record)
    return labels
