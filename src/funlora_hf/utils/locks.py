"""Lock a folder for one process; the errors of other processes name it."""

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

# The system releases the lock when its process ends, even after a kill; after a kill, this file and the owner's file stay.
LOCK_FILE = ".funlora.lock"
OWNER_FILE = ".funlora.owner.json"


class FolderInUseError(RuntimeError):
    """Another process works in the folder."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder until the block or the process ends; create it if it is missing.

    If the owner of a lock was killed, this process takes the lock over, with a warning that names the owner. On a filesystem
    without locks, filelock uses a marker file instead, and checks by the owner's host and process whether it is stale.

    Raises:
        FolderInUseError: another process has the lock; the error says which process, where and for how long.
        OSError: the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK_FILE), folder / OWNER_FILE
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"{folder} is in use by {_describe(owner)}. Wait for it or stop it, or use another folder: two processes at once would "
            "overwrite each other's files."
        ) from None
    try:
        if owner.is_file():
            logger.warning("Took over %s from %s, which ended without releasing it.", folder, _describe(owner))
        write_json(owner, {"host": platform.node(), "process": os.getpid(), "since": time.time()})
        yield
    finally:
        # Deleted before the release: a process that waits for this file sees that it is gone, and creates a new one.
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
        # The owner writes its file a moment after it takes the lock.
        return "an unknown process"
