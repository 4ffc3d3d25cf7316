"""Every benchmark runs on a small U-Net, with two rounds of each comparison, and writes what it found."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from diffusers import UNet2DModel
from runs import REPOSITORY, TINY_UNET


BENCHMARKS = REPOSITORY / "benchmarks"
NAMES = {path.stem for path in BENCHMARKS.glob("*.py")}
SHORT_RUN = {"base_train_steps": 4, "adapter_train_steps": 2, "num_inference_steps": 2, "classifier_epochs": 1}


def smaller(script):
    """What is changed in a script, besides the U-Net and the rounds, so that it ends in seconds."""
    changes = {
        "functional_matrix": lambda: {"SHAPES": [(8, 8)], "keep_freed_memory": lambda: None},
        "scaling": lambda: {"measure": partial(script.measure, (1, 3), (1, 2))},
        "soak": lambda: {
            "BASE_CLASSES": 2,
            "WINDOW": 4,
            "learn": partial(script.learn, **SHORT_RUN, image_quality="none"),
            "measure": partial(script.measure, 12),
        },
        "processes": lambda: {"measure": partial(script.measure, 2)},
        "linear": lambda: {"SIZES": (8, 16), "TOKENS": (2, 4)},
    }
    return changes.get(script.__name__, dict)()


@pytest.fixture
def interleaved(monkeypatch):
    """The module that all of them share. It and they are imported again for every test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield importlib.import_module("interleaved")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("adapter_bank", 3),
        ("evaluation", 3),
        ("functional_matrix", 6),
        ("training_step", 5),
        ("linear", 8),
        ("rivals", 7),
        ("scaling", 12),
        pytest.param("soak", 10, marks=pytest.mark.slow),
        pytest.param("processes", 1, marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_writes_its_results(name, results, interleaved, monkeypatch, tmp_path):
    turns = interleaved.take_turns
    monkeypatch.setattr(interleaved, "take_turns", lambda name, sides, **_: turns(name, sides, rounds=2))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    images = {"sample_size": 32, "in_channels": 3, "out_channels": 3, "num_class_embeds": 10}
    monkeypatch.setattr(
        importlib.import_module("backbone"), "paper_unet", lambda: UNet2DModel(**{**TINY_UNET, **images})
    )
    script = importlib.import_module(name)
    for attribute, value in smaller(script).items():
        monkeypatch.setattr(script, attribute, value)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output_dir", str(tmp_path), "--num_threads", "1"])
    path = interleaved.main(script.__doc__, script.measure, script.__file__)
    record = json.loads(path.read_text())
    assert sum(len(record.get(part, ())) for part in ("rows", "skipped", "curves")) == results
    assert f"## {name}" in interleaved.summary(tmp_path)
    if hasattr(script, "draw"):
        script.draw(path, path.with_suffix(".png"))
        assert path.with_suffix(".png").stat().st_size > 0


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_measures_everything_on_a_cpu(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--device", "cpu", "--small", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["missing"] == {}
    assert (len(record["rows"]), len(record["figures"]), len(record["estimate"])) == (14, 4, 4)


def test_a_ratio_is_the_median_over_turns_whose_order_alternates(interleaved, monkeypatch):
    """The first turn does not count, and the last is disturbed."""
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def side(name, *seconds):
        durations = itertools.cycle(seconds)

        def run():
            order.append(name)
            now[0] += next(durations)

        return run

    sides = {"a": side("a", 100.0, 3.0, 3.0, 3.0, 3.0, 30.0), "b": side("b", 1.0)}
    row = interleaved.compare("a / b", sides, rounds=5)
    assert (row.ratio, row.low, row.high, row.seconds) == (3.0, 3.0, 3.0, {"a": 3.0, "b": 1.0})
    assert "".join(order) == "baabbaabbaab"
