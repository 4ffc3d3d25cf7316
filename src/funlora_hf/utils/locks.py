"""One owner of a folder at a time, who is named to all others."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import read_json, write_json


logger = logging.getLogger(__name__)

# The system lets go of the lock when its process ends, however that ends; its file then stays, and the owner's with it.
LOCK_FILE = ".funlora.lock"
OWNER_FILE = ".funlora.owner.json"


class FolderInUseError(RuntimeError):
    """Another process works in the folder."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """
    Hold a folder, which is made if it is missing, until the block ends or the process does.

    A lock whose owner was killed is taken over, with a warning that says whose it was. On a filesystem without locks,
    filelock's marker file takes the place of the system's lock, which it takes for stale by the owner's host and process.

    Args:
        folder (`Path`): to hold.

    Raises:
        FolderInUseError: another process holds it; says which, where and since when.
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK_FILE), folder / OWNER_FILE
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"{folder} is in use by {_describe(owner)}. Wait for it or stop it, or take another folder; two at once would "
            "overwrite each other's files."
        ) from None
    try:
        if owner.is_file():
            logger.warning("Took over %s from %s, which ended without letting go of it.", folder, _describe(owner))
        write_json(owner, {"host": platform.node(), "process": os.getpid(), "since": time.time()})
        yield
    finally:
        # Deleted while it is held: whoever waits for this file sees that it has no name any more, and makes another.
        for path in (owner, folder / LOCK_FILE):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        lock.release()


def _describe(owner: Path) -> str:
    try:
        record: dict[str, Any] = read_json(owner)
        age = max(0.0, time.time() - record["since"])
        return f"process {record['process']} on {record['host']}, for {age / 60:.1f} minutes"
    except (OSError, ValueError, TypeError, KeyError):
        # Written a moment after the lock is taken.
        return "a process that has not said which it is"
