"""Runs that are killed at random moments, then go on, and end as if nothing had been."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runs import REPOSITORY, command_line, digests

from funlora_hf.files import read_json


SCRIPT = str(REPOSITORY / "tests" / "killed_run.py")
# Where a run is, by a function on its stack; the first that is there.
STAGES = {
    "writing or deleting files": r"in (whole_file|whole_folder|remove_folder|recover_folder|write_json|save_checkpoint|_sync)$",
    "classifier": r'classifier\.py", line',
    "samples": r'(pipeline|sampling|solvers|held_out)\.py", line',
    "report": r"in report_run$",
    "evaluation": r'evaluation/\w+\.py", line',
    "training": r"in _run_phase$",
}


@dataclass
class Uninterrupted:
    """A run from the command line, on one process and one thread: its folder, file operations there and seconds."""

    folder: Path
    operations: int
    seconds: float


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Uninterrupted:
    place = tmp_path_factory.mktemp("uninterrupted")
    with started(place) as process:
        begun = wait_for_work(place, process)
        assert process.wait() == 0, (place / "log").read_text()
    return Uninterrupted(place / "out", int((place / "operations").read_text()), time.monotonic() - begun)


@contextmanager
def started(
    place: Path, *, operation: int = 0, by: str = "SIGKILL", resume: bool = False
) -> Iterator[subprocess.Popen]:
    arguments = command_line(output_dir=None, resume_from_checkpoint="latest" if resume else None)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, SCRIPT, "out", str(operation), by, *arguments]
    with open(place / "log", "a") as log, subprocess.Popen(command, cwd=place, env=environment, stderr=log) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_work(place: Path, process: subprocess.Popen) -> float:
    """Seconds on the clock when the run has taken its folder."""
    while not (place / "out" / "checkpoints" / "run.json").is_file():
        assert process.poll() is None, (place / "log").read_text()
        time.sleep(0.002)
    return time.monotonic()


def stage(place: Path) -> str:
    """What the run was at when it was last told to end."""
    stack = (place / "stack").read_text()
    return next((name for name, pattern in STAGES.items() if re.search(pattern, stack, re.MULTILINE)), "between these")


def check_end(place: Path, code: int, by: str) -> None:
    """It ended by the signal: at once, or with what it says of SIGTERM."""
    log = (place / "log").read_text()
    assert code == (-signal.SIGKILL if by == "SIGKILL" else 143), log
    if by == "SIGTERM":
        assert "SIGTERM: stopped" in log
        assert "Traceback" not in log


def check_same(place: Path, expected: Path) -> None:
    """All files are those of the other run to the byte; those of JSON but for seconds and the argument that says to go on."""
    out = place / "out"
    found, known = digests(out), digests(expected)
    assert found.keys() == known.keys()
    changed = [name for name in known if found[name] != known[name]]
    assert not [name for name in changed if not re.fullmatch(r"(results|checkpoints/.*)\.json", name)]
    for name in changed:
        assert untimed(read_json(out / name)) == untimed(read_json(expected / name)), name


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("seconds", "resume_from_checkpoint")
        return {key: untimed(entry) for key, entry in value.items() if key not in left_out}
    return value


def kill_at_a_time(place: Path, fraction: float, by: str, seconds: float) -> tuple[int, float]:
    """Kill a new run after this fraction of the seconds that it takes, or sooner if it is faster today; exit code, seconds."""
    while True:
        with started(place) as process:
            begun = wait_for_work(place, process)
            time.sleep(max(0.0, begun + fraction * seconds - time.monotonic()))
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.01)
            sent = time.monotonic()
            process.send_signal(signal.Signals[by])
            code = process.wait(timeout=60)
        if not (place / "out" / "results.json").exists():
            return code, time.monotonic() - sent
        fraction *= 0.8
        shutil.rmtree(place / "out")
        (place / "log").unlink()


def resume(place: Path) -> None:
    with started(place, resume=True) as process:
        assert process.wait() == 0, (place / "log").read_text()


TIMES = [pytest.param(number, by, marks=pytest.mark.soak) for by in ("SIGKILL", "SIGTERM") for number in range(15)]
OPERATIONS = [
    pytest.param(number, by, marks=pytest.mark.soak) for by in ("SIGKILL", "SIGTERM") for number in range(15)
]


@pytest.mark.parametrize(("number", "by"), [*TIMES, (100, "SIGTERM")])
def test_killed_at_a_moment(number, by, uninterrupted, tmp_path, record_property):
    fraction = random.Random(number).random()
    code, seconds = kill_at_a_time(tmp_path, fraction, by, uninterrupted.seconds)
    check_end(tmp_path, code, by)
    record_property("stage", stage(tmp_path))
    record_property("seconds until the end", seconds)
    resume(tmp_path)
    check_same(tmp_path, uninterrupted.folder)


@pytest.mark.parametrize(("number", "by"), [*OPERATIONS, pytest.param(100, "SIGKILL", marks=pytest.mark.slow)])
def test_killed_before_a_file_operation(number, by, uninterrupted, tmp_path, record_property):
    operation = random.Random(number).randint(1, uninterrupted.operations)
    with started(tmp_path, operation=operation, by=by) as process:
        check_end(tmp_path, process.wait(), by)
    record_property("stage", stage(tmp_path))
    resume(tmp_path)
    check_same(tmp_path, uninterrupted.folder)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(3))
def test_killed_again_and_again(number, uninterrupted, tmp_path, record_property):
    """Some of these runs die before they have learned anything more; what is there stays."""
    chance, kills = random.Random(number), 0
    while True:
        by = chance.choice(["SIGKILL", "SIGTERM"])
        with started(tmp_path, operation=chance.randint(1, 60), by=by, resume=kills > 0) as process:
            if process.wait() == 0:
                break
        check_end(tmp_path, process.returncode, by)
        kills += 1
        assert kills < 100
        (tmp_path / "log").write_text("")
    assert kills > 3
    record_property("kills", kills)
    check_same(tmp_path, uninterrupted.folder)
