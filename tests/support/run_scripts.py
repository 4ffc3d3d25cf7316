"""Runs scripts one after another, each in a fork of one process that has imported the libraries; prints each one's exit status.

python tests/support/run_scripts.py FOLDER_FOR_OUTPUT SCRIPT...
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

import datasets
import diffusers
import peft

import funlora_hf.run


LIBRARIES = (datasets, diffusers, peft, funlora_hf.run)  # imported once for all


def run_script(script: str, output: Path) -> None:
    """Run a script with its output in a file, and end the process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 0
    try:
        sys.argv = [script]
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(folder: Path, scripts: list[str]) -> None:
    for script in scripts:
        process = os.fork()
        if process == 0:
            run_script(script, folder / Path(script).name)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), script, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
