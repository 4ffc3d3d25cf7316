"""What surrounds a run: trackers, the folder's lock, the kernels, and the end of its processes."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator

from ..utils.locks import folder_lock
from .config import LoopArguments
from .devices import deterministic_kernels
from .time_limit import TimeLimitReached


def start_trackers(accelerator: Accelerator, training: LoopArguments) -> None:
    """Start the trackers that the run requests."""
    if training.report_to != "none":
        accelerator.init_trackers("logs")


@contextmanager
def held(folder: Path, accelerator: Accelerator, training: LoopArguments) -> Iterator[None]:
    """Hold the folder's lock, in the main process for all processes, and use the kernels that the run requests."""
    lock = folder_lock(folder) if accelerator.is_main_process else nullcontext()
    with lock, deterministic_kernels(accelerator.device, wanted=training.deterministic):
        yield


@contextmanager
def ended(accelerator: Accelerator) -> Iterator[None]:
    """End trackers and the process group after training, also at the time limit: gloo could abort on exit otherwise."""
    try:
        yield
    except TimeLimitReached as reached:
        # Its frames refer to a model that is wrapped for the group.
        traceback.clear_frames(reached.__traceback__)
        accelerator.end_training()
        raise
    accelerator.end_training()
