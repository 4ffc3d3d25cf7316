"""The benchmark of one GPU, on a CPU with toys: that it runs, and what it writes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from runs import REPOSITORY


BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", [*sys.path])
    import gpu

    return gpu


def start(*arguments, check=True):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.slow
def test_everything_is_measured(tmp_path):
    before = {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()}
    done = start("--device", "cpu", "--small", "--output_dir", str(tmp_path))
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["missing"] == {}
    assert {"device": "cpu", "small": True}.items() <= record.items()
    assert record["machine"]
    names = " ".join(row["name"] for row in record["rows"])
    for part in ("FunLoRA / floor", "FunLoRA / all weights", "one adapter / base", "/ one class", "AdapterBank"):
        assert part in names
    for part in ("functional_matrix", "torch.compile", "float32", "bfloat16, channels_last, compiled"):
        assert part in names
    assert all(math.isfinite(row["ratio"]) and min(row["seconds"].values()) > 0 for row in record["rows"])
    figures = {figure["name"]: figure["values"] for figure in record["figures"]}
    assert set(figures["steps a second in the recipe's loop"]) == {"base", "class_2", "class_3"}
    assert all(math.isfinite(value) and value > 0 for values in figures.values() for value in values.values())
    assert len(record["estimate"]) == 4
    assert record["estimate"][-1] in done.stdout
    assert {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()} == before


def test_what_time_did_not_allow_is_named(tmp_path):
    done = start("--device", "cpu", "--small", "--minutes", "0", "--output_dir", str(tmp_path))
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["rows"] == []
    assert len(record["missing"]) == 12
    assert "bank: not begun: time is over" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--device", "cpu", "--small"], "is no result: name a folder for it by --output_dir"),
        (["--device", "cpu", "--output_dir", str(BENCHMARKS / "results")], "where results of GPUs go"),
    ],
)
def test_toys_leave_no_results(arguments, text):
    done = start(*arguments, check=False)
    assert done.returncode == 2
    assert text in done.stderr


def test_one_that_fails_costs_none_of_the_others(gpu, monkeypatch):
    benchmark = gpu.Benchmark(torch.device("cpu"), gpu.SMALL, None, "eager")
    ran = []
    monkeypatch.setattr(
        benchmark, "measurements", lambda: {"a": lambda: 1 / 0, "b": lambda: ran.append("b")}, raising=False
    )
    *_, missing = gpu.measure(benchmark, minutes=1e9, started=0.0)
    assert missing == {"a": "ZeroDivisionError: division by zero"}
    assert ran == ["b"]


def test_the_estimate_is_the_recipe_s_arithmetic(gpu):
    """500 epochs of 10,000 images in batches of 200, 8 classes of 10 epochs of 5,000 in batches of 300, 10 times 30 samples."""
    arguments = SimpleNamespace(
        data=SimpleNamespace(classes_per_task=2),
        training=SimpleNamespace(
            base_epochs=500, base_batch_size=200, adapter_epochs=10, adapter_batch_size=300, time_limit_minutes=4.0
        ),
        evaluation=SimpleNamespace(num_samples_per_class=30),
    )
    lines = gpu.estimate(arguments, 50.0, 10.0, 3.0)
    assert lines == [
        "base: 25000 steps / 50 a second = 500 s",
        "classes: 8 x 170 steps / 10 a second = 136 s",
        "sampling: 300 images / 3 a second = 100 s",
        "together 736 s = 12.3 minutes, without classifiers and compilation, pieces of 4 minutes: 4",
    ]


def test_bytes_saved_counts_each_storage_once(gpu):
    x = torch.randn(100, requires_grad=True)
    assert gpu.bytes_saved(lambda: x.exp()) == 400  # its result
    assert gpu.bytes_saved(lambda: x * x) == 400  # x, twice
    assert gpu.bytes_saved(lambda: x + 1) == 0
    assert gpu.bytes_saved(lambda: x.exp().sin()) == 400  # the first's result, which is the second's input
