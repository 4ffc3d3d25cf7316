"""Readers of files that anybody may have written, led into their branches by libFuzzer: tests/support/coverage_guided.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("atheris", reason="atheris, which leads libFuzzer through Python, is not installed")

RUNS = {
    "recipe": 50_000,
    "config": 50_000,
    "bank": 50_000,
    "base": 20_000,
    "shapes": 20_000,
    "tensors": 20_000,
    "image": 100_000,
}


def fuzz(reader: str, runs: int, folder: Path) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[1] / "support" / "coverage_guided.py"
    command = [sys.executable, str(script), reader, str(folder), f"-runs={runs}", "-seed=1"]
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


@pytest.mark.parametrize(
    ("reader", "runs"),
    [("recipe", 1000), *(pytest.param(*pair, marks=pytest.mark.soak) for pair in RUNS.items())],
)
def test_each_try_is_read_or_refused(reader, runs, tmp_path):
    done = fuzz(reader, runs, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {runs} runs" in done.stderr
    # From the sound files it came to others, which take branches that those do not.
    sound = len(list((tmp_path / "corpus").glob("sound-*")))
    assert len(list((tmp_path / "corpus").iterdir())) > sound


@pytest.mark.soak
def test_what_only_steps_lead_to_is_found(tmp_path):
    done = fuzz("careless", 5_000_000, tmp_path)
    assert done.returncode == 77, done.stderr[-4000:]
    assert "KeyError" in done.stdout
    (found,) = tmp_path.glob("crash-*")
    assert re.match(rb"\x07\x80\x2a\x91", found.read_bytes())
