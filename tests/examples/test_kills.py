"""Runs that are killed at random moments, then go on, and end as if nothing had been."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from started_runs import assert_same_run, finish, log_of, short, started, wait_for_work


# Where a run is, by a function on its stack; the first that is there.
STAGES = {
    "writing or deleting files": r"in (whole_file|whole_folder|remove_folder|recover_folder|write_json|save_checkpoint|_sync)$",
    "classifier": r'classifier\.py", line',
    "samples": r'(pipeline|sampling|solvers|held_out)\.py", line',
    "report": r"in report_run$",
    "evaluation": r'evaluation/\w+\.py", line',
    "training of {}": r"in _run_phase$",
}


def stage(place: Path) -> str:
    """What the run was at when it was told to end."""
    stack = (place / "stack.0").read_text()
    found = next(
        (name for name, pattern in STAGES.items() if re.search(pattern, stack, re.MULTILINE)), "between these"
    )
    return found.format("an adapter" if (place / "out" / "base").exists() else "the base")


def check_end(place: Path, code: int, by: str) -> None:
    """It ended by the signal: at once, or with what it says of SIGTERM."""
    log = log_of(place)
    assert code == (-signal.SIGKILL if by == "SIGKILL" else 143), log
    if by == "SIGTERM":
        assert "SIGTERM: stopped" in log
        assert "Traceback" not in log


def kill_at_a_time(
    place: Path, fraction: float, by: str, seconds: float, before: str = "results.json"
) -> tuple[int, float]:
    """Kill a new run after this fraction of the seconds that it takes until it has a file or folder, or sooner if it is faster today;
    exit code, seconds."""
    while True:
        with started(place) as process:
            begun = wait_for_work(place, process)
            time.sleep(max(0.0, begun + fraction * seconds - time.monotonic()))
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.01)
            sent = time.monotonic()
            process.send_signal(signal.Signals[by])
            code = process.wait(timeout=60)
        if not (place / "out" / before).exists():
            return code, time.monotonic() - sent
        fraction *= 0.8
        shutil.rmtree(place / "out")
        for name in ("log", "stack.0"):
            (place / name).unlink()


PARTS = 15
MANY = [pytest.param(number, by, marks=pytest.mark.soak) for by in ("SIGKILL", "SIGTERM") for number in range(PARTS)]


@pytest.mark.parametrize(("number", "by"), [*MANY, pytest.param(100, "SIGTERM", marks=pytest.mark.slow)])
def test_killed_at_a_moment(number, by, uninterrupted, tmp_path, record_property):
    # One in each part of a run, so that none of its stages is left out.
    fraction = (number % PARTS + random.Random(number).random()) / PARTS
    code, seconds = kill_at_a_time(tmp_path, fraction, by, uninterrupted.seconds)
    check_end(tmp_path, code, by)
    record_property("stage", stage(tmp_path))
    record_property("seconds until the end", seconds)
    finish(tmp_path)
    assert_same_run(tmp_path / "out", uninterrupted.folder)


@pytest.mark.soak
@pytest.mark.parametrize("by", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("number", range(3))
def test_killed_before_there_is_a_base(number, by, uninterrupted, tmp_path, record_property):
    """Its training is so short a part of the run that the moments above may miss it."""
    fraction = (number + random.Random(number).random()) / 3
    code, _ = kill_at_a_time(tmp_path, fraction, by, uninterrupted.seconds_of_base, before="base")
    check_end(tmp_path, code, by)
    record_property("stage", stage(tmp_path))
    finish(tmp_path)
    assert_same_run(tmp_path / "out", uninterrupted.folder)


@pytest.mark.parametrize(("number", "by"), [*MANY, pytest.param(100, "SIGKILL", marks=pytest.mark.slow)])
def test_killed_before_a_file_operation(number, by, uninterrupted, tmp_path, record_property):
    operation = random.Random(number).randint(1, uninterrupted.operations)
    with started(tmp_path, operation=operation, by=by) as process:
        check_end(tmp_path, process.wait(), by)
    record_property("stage", stage(tmp_path))
    finish(tmp_path)
    assert_same_run(tmp_path / "out", uninterrupted.folder)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(3))
def test_killed_again_and_again(number, uninterrupted, tmp_path, record_property):
    """Some of these runs die before they have learned anything more; what is there stays."""
    chance, kills = random.Random(number), 0
    while True:
        by = chance.choice(["SIGKILL", "SIGTERM"])
        arguments = short(resume_from_checkpoint="latest" if kills else None)
        with started(tmp_path, arguments, operation=chance.randint(1, 60), by=by) as process:
            if process.wait() == 0:
                break
        check_end(tmp_path, process.returncode, by)
        kills += 1
        assert kills < 100
        (tmp_path / "log").write_text("")
    assert kills > 3
    record_property("kills", kills)
    assert_same_run(tmp_path / "out", uninterrupted.folder)
