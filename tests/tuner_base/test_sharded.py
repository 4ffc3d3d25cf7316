"""Models that two processes share by FSDP: outputs and gradients are those of one process. See sharded_run.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow
SUPPORT = Path(__file__).parents[1] / "support"
ways = pytest.mark.parametrize("way", ["fsdp1", "fsdp1 embedding", "fsdp2", "fsdp2 root"])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found: the greatest difference from one process, or the text of an error."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])}
    processes = []
    try:
        for rank in range(2):
            command = [sys.executable, str(SUPPORT / "sharded_run.py"), str(rank), str(folder)]
            with open(folder / f"log.{rank}", "w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    log = (folder / "log.0").read_text()[-2000:]
    assert (folder / "found.json").exists(), log
    return {**json.loads((folder / "found.json").read_text()), "codes": codes, "log": log}


def check(found, *keys):
    for key in keys:
        assert isinstance(found.get(key), float), f"{key}: {found.get(key, found['log'])}"
        assert found[key] < 1e-5, key


def check_or_refused(found, key):
    if isinstance(found.get(key), float):
        check(found, key)
    else:
        assert found.get(key, found["log"]).startswith("ValueError")
        assert "shard" in found[key]


@ways
def test_outputs_and_gradients_are_those_of_one_process(found, way):
    check(found, *(f"{way}, {what}" for what in ("forward", "mixed", "disabled", "gradients", "after gradients")))


@ways
def test_merging_a_sharded_weight_is_right_or_refused(found, way):
    check_or_refused(found, f"{way}, merge")
    check(found, f"{way}, after merge")


@ways
def test_delta_of_a_sharded_weight_is_right_or_refused(found, way):
    check_or_refused(found, f"{way}, delta")
    check(found, f"{way}, after delta")


def test_processes_end_without_an_error(found):
    assert found["codes"] == [0, 0], found["log"]
