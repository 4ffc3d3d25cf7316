"""Functions in a process of their own that is forked, since a new interpreter takes seconds to import torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from funlora_hf.utils.locks import folder_lock


def exit_code(function: Callable[[], Any]) -> int | None:
    """How a child ends that calls a function; None if it has not ended after two minutes."""
    process = get_context("fork").Process(target=function)
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    return code


@contextmanager
def held(folder: Path) -> Iterator[BaseProcess]:
    """A child that has locked a folder; killed at the end."""
    context = get_context("fork")
    ready = context.Event()

    def hold() -> None:
        with folder_lock(folder):
            ready.set()
            time.sleep(600)

    process = context.Process(target=hold)
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()
        process.join()
