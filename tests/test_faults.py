"""Faults that were found by trying the product: each script of tests/faults exits 1 where its fault is present."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from runs import REPOSITORY


SCRIPTS = sorted((REPOSITORY / "tests" / "faults").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_fault(script, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
