"""A script: the example, watched at what it does to the files of its folder, and perhaps ended before one of them.

    [launcher] watched_run.py out 12 SIGKILL [arguments of continual_train.py]

0 stands for none: the run goes to its end, and then what it did goes to `operations.<rank>`, JSON of [event, path in the folder].
Where it is when it ends, and on SIGUSR1, goes to `stack.<rank>` as a traceback.
"""

from __future__ import annotations

import faulthandler
import json
import os
import runpy
import signal
import sys
from pathlib import Path

from write_events import on_write


REPOSITORY = Path(__file__).parents[2]


def main(output_dir: str, number: str, name: str, *arguments: str) -> None:
    rank = os.environ.get("RANK", "0")
    stack = open(f"stack.{rank}", "a")  # noqa: SIM115 - until the process ends
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    root, seen = os.path.realpath(output_dir) + os.sep, []

    def tell(event: str, path: str) -> None:
        if not path.startswith(root):
            return
        seen.append((event, path.removeprefix(root)))
        if len(seen) == int(number):
            faulthandler.dump_traceback(stack, all_threads=False)
            os.kill(os.getpid(), signal.Signals[name])

    on_write(tell)
    sys.argv = ["continual_train.py", *arguments, "--output_dir", output_dir]
    runpy.run_path(str(REPOSITORY / "examples" / "continual_train.py"), run_name="__main__")
    Path(f"operations.{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
