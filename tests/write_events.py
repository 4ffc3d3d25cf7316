"""What Python is about to do to files and folders: for scripts that watch a run from inside. There is no way to stop watching."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def on_write(tell: Callable[[str], None]) -> None:
    """Call `tell` with the real path of whatever is opened to write, made, renamed, linked or deleted, before it happens.

    Libraries in Rust or C that open files themselves raise no such event.
    """

    def check(path, dir_fd=-1) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.fsdecode(path)
            tell(path if path == os.devnull else os.path.realpath(_absolute(path, dir_fd)))

    def hook(event: str, arguments) -> None:
        if event == "open":
            path, mode, flags = arguments
            if set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                check(path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            check(arguments[0], arguments[-1])
        elif event in ("os.rename", "os.link"):
            check(arguments[1], arguments[3])
        elif event == "os.symlink":
            check(arguments[1], arguments[2])
        elif event in ("os.chmod", "os.truncate"):
            check(arguments[0])

    sys.addaudithook(hook)


def _absolute(path: str, dir_fd: int) -> str:
    return path if dir_fd == -1 else f"/proc/self/fd/{dir_fd}/{path}"
