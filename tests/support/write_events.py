"""What Python is about to do to files and folders: for scripts that watch a run from inside. There is no way to stop watching."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def on_write(tell: Callable[[str, str], None]) -> None:
    """Call `tell` before anything is opened to write, made, renamed, linked or deleted: the event's name, and the real path.

    Of something that is renamed it is the new path.

    Libraries in Rust or C that open files themselves raise no such event.
    """

    def hook(event: str, arguments) -> None:
        path, dir_fd = _target(event, arguments)
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.fsdecode(path)
            tell(event, path if path == os.devnull else os.path.realpath(_absolute(path, dir_fd)))

    sys.addaudithook(hook)


def _target(event: str, arguments) -> tuple:
    """What an event changes, as a path and the folder that it starts from; (None, -1) if it changes nothing."""
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return (path, -1) if writes else (None, -1)
    if event in ("os.mkdir", "os.remove", "os.rmdir"):
        return arguments[0], arguments[-1]
    if event in ("os.rename", "os.link"):
        return arguments[1], arguments[3]
    if event == "os.symlink":
        return arguments[1], arguments[2]
    return (arguments[0], -1) if event in ("os.chmod", "os.truncate") else (None, -1)


def _absolute(path: str, dir_fd: int) -> str:
    return path if dir_fd == -1 else f"/proc/self/fd/{dir_fd}/{path}"
