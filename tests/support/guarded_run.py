"""A script: a short run that stops and goes on, in a process that may not unpickle and may write below few folders only.

    python guarded_run.py data.parquet out 1,4,12,0,sample,update allowed-folder...

A number says after how many looks at its clock the run stops, 0 that it runs to its end. Both guards stay for the life of a
process, so they have one of their own. Started by a launcher, it is one of several, which can run only once.
"""

from __future__ import annotations

import os
import pickle
import sys
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic
from typing import ClassVar

from write_events import on_write


class UnpickledError(BaseException):
    """Not an Exception: nothing is to get over it."""


class WroteOutsideError(BaseException):
    """Not an Exception, either."""


def refuse(*_, **__):
    raise UnpickledError


class Refuses:
    """In place of an unpickler; libraries derive classes from those."""

    __init__ = load = find_class = refuse
    dispatch: ClassVar = {}


def forbid_unpickling() -> None:
    """Before any library is imported, so that none has the real functions."""
    import _pickle

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
            if hasattr(module, name):
                setattr(module, name, Refuses if name.endswith("Unpickler") else refuse)

    def hook(event: str, _) -> None:
        # Whatever unpickler it is, in C or in Python.
        if event == "pickle.find_class":
            raise UnpickledError

    sys.addaudithook(hook)


def forbid_writing(allowed: list[Path]) -> set[str]:
    """Raise where anything is opened to write, made, renamed or deleted elsewhere; returns the paths that were, as a run goes on."""
    roots, written = [os.path.realpath(folder) for folder in allowed], set()

    def check(_: str, place: str) -> None:
        written.add(place)
        if place != os.devnull and not any(place == root or place.startswith(root + os.sep) for root in roots):
            raise WroteOutsideError(place)

    on_write(check)
    return written


def main(data: str, output_dir: str, steps: str, *allowed: str) -> None:
    forbid_unpickling()
    written = forbid_writing([Path(folder) for folder in allowed])
    import torch
    from runs import short_run

    from funlora_hf import FunLoraPipeline
    from funlora_hf.continual import time_limit
    from funlora_hf.run import run

    # The guards are there: what a library has imported by now is what they put there.
    for load in (pickle.loads, torch.serialization.pickle.Unpickler, sys.modules["dill"].loads):
        try:
            load(b"N.")
        except UnpickledError:
            continue
        raise AssertionError(f"{load} unpickles")
    torch.set_num_threads(1)
    options = {
        "dataset_name": data,
        "output_dir": output_dir,
        "classes_per_task": 3,
        "max_images_per_class": None,
        "base_train_steps": 4,
        "adapter_train_steps": 4,
        "checkpointing_steps": 2,
        "num_samples_per_class": 2,
        "image_quality_neighbours": 1,
    }
    for step in steps.split(","):
        if step == "sample":
            sample(FunLoraPipeline, output_dir)
        elif step == "update":
            run(short_run(**options, update_class=4))
        elif step == "0":
            time_limit.monotonic = monotonic
            run(short_run(**options, resume_from_checkpoint="latest"))
        else:
            # A second goes by whenever a run looks at its clock.
            time_limit.monotonic = partial(next, count())
            try:
                run(short_run(**options, resume_from_checkpoint="latest", time_limit_minutes=int(step) / 60))
            except time_limit.TimeLimitReached as reached:
                print(reached)
            else:
                raise AssertionError("the run did not stop")
    if os.environ.get("RANK", "0") == "0":
        assert any(path.startswith(os.path.realpath(output_dir)) for path in written)


def sample(pipeline, output_dir: str) -> None:
    """One image of each class of a run."""
    pipe = pipeline.from_pretrained(output_dir + "/base")
    pipe.set_progress_bar_config(disable=True)
    adapters = sorted(Path(output_dir, "adapters").glob("class_*"))
    for folder in adapters:
        pipe.load_adapter(folder)
    assert len(adapters) == 3
    assert len(pipe(list(pipe.classes), num_inference_steps=1).images) == 6


if __name__ == "__main__":
    main(*sys.argv[1:])
