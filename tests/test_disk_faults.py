"""Disks that fill, folders that turn read-only, are closed or vanish during a run: it says so, loses nothing and can go on."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from runs import short_run
from started_runs import assert_same_run
from write_events import on_write

from funlora_hf.run import run
from funlora_hf.utils.files import WriteError


class Operations:
    """Counts what is done to files below a folder, and calls something before one of these operations.

    `last` is the number of the one by which the run has its results.
    """

    def __init__(self) -> None:
        self.seen, self.last, self._at, self._root, self._action = 0, 0, 0, None, None
        on_write(self._tell)

    def watch(self, root: Path, at: int = 0, action: Callable[[], None] | None = None) -> None:
        self.seen, self._at, self._action = 0, at, action
        self._root = os.path.realpath(root) + os.sep

    def stop(self) -> None:
        self._root = None

    def _tell(self, event: str, path: str) -> None:
        if self._root is None or not path.startswith(self._root):
            return
        self.seen += 1
        if (event, path) == ("os.rename", f"{self._root}results.json"):
            self.last = self.seen
        if self.seen == self._at:
            self.stop()
            self._action()


OUT = Path("disk", "out")


def do(resume: str | None = None) -> None:
    """A run of two tasks, in the current folder."""
    run(
        short_run(
            output_dir=str(OUT),
            classes_per_task=8,
            num_tasks=2,
            image_quality="none",
            resume_from_checkpoint=resume,
        )
    )


@pytest.fixture(scope="module")
def operations() -> Operations:
    return Operations()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, operations) -> tuple[Path, int]:
    """A run's folder, and the number of file operations before the one that gives it its results."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        operations.watch(OUT)
        do()
        operations.stop()
    # Renaming itself needs no room.
    return place / OUT, operations.last - 1


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        # Lazily, since files of a run may still be mapped into memory.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


OFTEN = pytest.mark.parametrize(
    "number", [0, *(pytest.param(number, marks=pytest.mark.soak) for number in range(1, 11))]
)


def moment(number: int, uninterrupted: tuple[Path, int]) -> int:
    return random.Random(number).randint(1, uninterrupted[1])


@OFTEN
def test_full(number, uninterrupted, operations):
    """A disk of its own, on which not a byte is left from some moment on."""
    filler = OUT.parent / "filler"

    def fill() -> None:
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(2**16))

    with mounted(OUT.parent, "-t", "tmpfs", "-o", "size=8m", "tmpfs"):
        operations.watch(OUT, moment(number, uninterrupted), fill)
        try:
            do()
        except WriteError as error:
            assert re.search(r"out/.* could not be written \(.*(No space left|os error 28).*Make room", str(error))  # noqa: PT017 - it may not come
        else:
            # So late that nothing more needed room: only of the random moments.
            assert number
            assert (OUT / "results.json").is_file()
        filler.unlink()
        do(resume="latest")
        assert_same_run(OUT, uninterrupted[0])


@OFTEN
def test_read_only(number, uninterrupted, operations):
    with ExitStack() as stack:

        def close() -> None:
            stack.enter_context(mounted(OUT, "--bind", "-o", "ro", str(OUT)))

        operations.watch(OUT, moment(number, uninterrupted), close)
        with pytest.raises(OSError, match="disk/out/"):
            do()
    do(resume="latest")
    assert_same_run(OUT, uninterrupted[0])


@contextmanager
def nobodys(folder: Path) -> Iterator[Callable[[], None]]:
    """What it gives takes away this process's right to write in a folder, until the block ends."""
    user = os.geteuid()

    def close() -> None:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o555)
        if user == 0:
            os.seteuid(65534)

    try:
        yield close
    finally:
        os.seteuid(user)
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)


@OFTEN
def test_permission_denied(number, uninterrupted, tmp_path, operations):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    OUT.mkdir(parents=True)
    with nobodys(OUT) as close:
        operations.watch(OUT, moment(number, uninterrupted), close)
        with pytest.raises(OSError, match="disk/out/"):
            do()
    do(resume="latest")
    assert_same_run(OUT, uninterrupted[0])


VANISHED = r"was deleted or moved|out/.* could not be written"


@OFTEN
def test_moved(number, uninterrupted, tmp_path, operations):
    """Nothing more is learned where it was."""
    elsewhere = tmp_path / "elsewhere"
    operations.watch(OUT, max(20, moment(number, uninterrupted)), lambda: OUT.rename(elsewhere))
    with pytest.raises(OSError, match=VANISHED):
        do()
    assert not (OUT / "results.json").exists()
    shutil.rmtree(OUT, ignore_errors=True)
    elsewhere.rename(OUT)
    do(resume="latest")
    assert_same_run(OUT, uninterrupted[0])


def test_deleted(uninterrupted, operations):
    operations.watch(OUT, uninterrupted[1] // 2, lambda: shutil.rmtree(OUT))
    with pytest.raises(OSError, match=VANISHED):
        do()
    # What was being written at that moment may be there.
    assert not [OUT / name for name in ("results.json", "base", "adapters") if (OUT / name).exists()]
