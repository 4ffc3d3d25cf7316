"""Faults that were found by trying the product: each script of tests/faults exits 1 where its fault is present."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from runs import REPOSITORY


SCRIPTS = sorted((REPOSITORY / "tests" / "faults").glob("*.py"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Exit status and output of each script."""
    folder = tmp_path_factory.mktemp("faults")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    runner = REPOSITORY / "tests" / "support" / "run_scripts.py"
    done = subprocess.run(
        [sys.executable, runner, folder, *SCRIPTS],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    codes = [int(line.split(" ", 1)[0]) for line in done.stdout.splitlines()]
    return {script: (code, (folder / script.name).read_text()) for script, code in zip(SCRIPTS, codes, strict=True)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the scripts run in forks of one process")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_fault(script, ended):
    code, output = ended[script]
    assert code == 0, output[-4000:]
