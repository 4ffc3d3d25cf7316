"""The seed alone says what comes out: not what Python hashes by, nor where the global generators stand, nor the time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import digests
from started_runs import assert_same_run


SCRIPT = """
import os, random, sys
import numpy, torch
from runs import short_run
from funlora_hf.run import run

number = int(sys.argv[1])
random.seed(number)
numpy.random.seed(number)
torch.manual_seed(number)
for _ in range(number):
    random.random(), numpy.random.rand(), torch.rand(1)
options = {"classes_per_task": 2, "num_tasks": 2, "random_flip": True, "class_order_seed": 3, "image_quality": "none"}
for name in sys.argv[2:]:
    # What a run writes names its folder, so all are called out.
    os.makedirs(name)
    os.chdir(name)
    run(short_run(output_dir="out", **options))
    os.chdir("..")
"""


def begin(place: Path, number: int, *names: str) -> subprocess.Popen:
    """Runs of one seed, one after another in a process of its own, which is unlike others in all that must not matter."""
    place.mkdir()
    environment = {**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH", "")]
    )
    arguments = [sys.executable, "-c", SCRIPT, str(number), *names]
    return subprocess.Popen(arguments, cwd=place, env=environment, stderr=open(place / "log", "w"))


def check(tmp_path: Path, processes: int, names: tuple[str, ...]) -> None:
    places = [tmp_path / str(number) for number in range(1, processes + 1)]
    for pair in zip(places[::2], places[1::2], strict=True):
        begun = [begin(place, int(place.name), *names) for place in pair]
        for process, place in zip(begun, pair, strict=True):
            assert process.wait() == 0, (place / "log").read_text()[-4000:]
    expected = places[0] / names[0] / "out"
    learned = [name for name in digests(expected) if name.endswith("adapter_model.safetensors")]
    assert len(learned) == 2
    for found in [place / name / "out" for place in places for name in names][1:]:
        assert_same_run(found, expected)


def test_two_processes_learn_the_same_to_the_byte(tmp_path):
    check(tmp_path, 2, ("only",))


@pytest.mark.soak
def test_many_runs_learn_the_same_to_the_byte(tmp_path):
    check(tmp_path, 6, ("first", "second"))
