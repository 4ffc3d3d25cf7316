"""A script: the example, which ends itself before one of the files of its folder is made, renamed or deleted.

    python killed_run.py out 12 SIGKILL [arguments of continual_train.py]

0 stands for none: the run goes to its end. Where it is when it ends, and on SIGUSR1, goes to the file `stack` as a traceback;
how many such operations there were goes to the file `operations`.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import sys
from pathlib import Path

from write_events import on_write


REPOSITORY = Path(__file__).parents[1]


def main(output_dir: str, number: str, name: str, *arguments: str) -> None:
    stack = open("stack", "a")  # noqa: SIM115 - until the process ends
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    root, seen = os.path.realpath(output_dir) + os.sep, 0

    def tell(path: str) -> None:
        nonlocal seen
        if not path.startswith(root):
            return
        seen += 1
        if seen == int(number):
            faulthandler.dump_traceback(stack, all_threads=False)
            os.kill(os.getpid(), signal.Signals[name])

    on_write(tell)
    sys.argv = ["continual_train.py", *arguments, "--output_dir", output_dir]
    runpy.run_path(str(REPOSITORY / "examples" / "continual_train.py"), run_name="__main__")
    Path("operations").write_text(str(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
