"""Runs of the example in processes of their own, that a test can end and start again, and what must be the same afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import REPOSITORY, command_line, digests

from funlora_hf.utils.files import read_json


SCRIPT = str(REPOSITORY / "tests" / "support" / "watched_run.py")


@dataclass
class Uninterrupted:
    """A run from the command line, on one process and one thread: its folder, file operations there and seconds, in all and
    until it has its base."""

    folder: Path
    operations: int
    seconds: float
    seconds_of_base: float


def torchrun(processes: int) -> tuple[str, ...]:
    """A launcher that takes a free port."""
    return (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone")


@contextmanager
def started(
    place: Path,
    arguments: Sequence[str] = (),
    *,
    launcher: Sequence[str] = (sys.executable,),
    operation: int = 0,
    by: str = "SIGKILL",
) -> Iterator[subprocess.Popen]:
    """A short run in `place`/out, its messages in `place`/log; ended at the latest with the block. See watched_run.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, SCRIPT, "out", str(operation), by, *(arguments or short())]
    with open(place / "log", "a") as log, subprocess.Popen(command, cwd=place, env=environment, stderr=log) as process:
        try:
            yield process
        finally:
            process.kill()


def short(**overrides: Any) -> list[str]:
    """The arguments of a short run but for its folder; its classifier takes long enough to be met at work."""
    return command_line(output_dir=None, classifier_epochs=20, **overrides)


def finish(place: Path, arguments: Sequence[str] = (), *, launcher: Sequence[str] = (sys.executable,)) -> None:
    """Go on with a run, or start it, to its end."""
    with started(place, arguments or short(resume_from_checkpoint="latest"), launcher=launcher) as process:
        assert process.wait() == 0, log_of(place)


def log_of(place: Path) -> str:
    return (place / "log").read_text()[-4000:]


def operations(place: Path, rank: int = 0) -> list[tuple[str, str]]:
    """What a finished process did to the files of its run: event and path."""
    return [tuple(entry) for entry in json.loads((place / f"operations.{rank}").read_text())]


def wait_for(path: Path, process: subprocess.Popen) -> float:
    """Seconds on the clock when there is a file or folder."""
    for _ in range(60_000):
        if path.exists():
            return time.monotonic()
        assert process.poll() is None, log_of(Path(path.parts[0]))
        time.sleep(0.002)
    raise AssertionError(f"{path} did not appear")


def wait_for_work(place: Path, process: subprocess.Popen) -> float:
    """Seconds on the clock when the run has taken its folder."""
    return wait_for(place / "out" / "checkpoints" / "run.json", process)


def assert_same_run(found: Path, expected: Path) -> None:
    """All files of a run are those of the other to the byte; those of JSON but for seconds, who did it, and the argument to go on."""
    mine, theirs = digests(found), digests(expected)
    assert mine.keys() == theirs.keys()
    changed = [name for name in theirs if mine[name] != theirs[name]]
    assert not [name for name in changed if not re.fullmatch(r"(results|checkpoints/.*)\.json", name)]
    for name in changed:
        assert _untimed(read_json(found / name)) == _untimed(read_json(expected / name)), name


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("seconds", "process", "resume_from_checkpoint")
        return {key: _untimed(entry) for key, entry in value.items() if key not in left_out}
    return value
