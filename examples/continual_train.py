"""Trains a generator class after class. Without arguments: scikit-learn's digits, two classes a task.

    accelerate launch examples/continual_train.py
    accelerate launch examples/continual_train.py --config examples/recipes/cifar10_2-2.yaml --seed 1

`--help` lists all arguments; a recipe gives defaults, arguments on the command line win.

Exit codes: 0, finished; 75 (EX_TEMPFAIL), `--time_limit_minutes` is over; 143, SIGTERM has come; 130, Ctrl-C: after these
three, `--resume_from_checkpoint latest` goes on; 1, an error; 2, an argument that is not known. Of a process that a launcher
(torchrun, accelerate launch) has started, the launcher itself returns 1 for each but 0.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from transformers import HfArgumentParser

from funlora_hf.continual.compilation import CompilationError
from funlora_hf.continual.config import ARGUMENTS
from funlora_hf.continual.publishing import PushError
from funlora_hf.continual.termination import Terminated, Termination
from funlora_hf.continual.time_limit import TimeLimitReached
from funlora_hf.continual.trainer import NonFiniteLossError
from funlora_hf.evaluation.report import ForgettingError
from funlora_hf.recipes.reading import read_recipe
from funlora_hf.run import RunArguments, run
from funlora_hf.utils.locks import FolderInUseError


# Errors whose message says all that there is to say.
ERRORS = (
    ValueError,
    OSError,
    ImportError,
    FolderInUseError,
    CompilationError,
    NonFiniteLossError,
    ForgettingError,
    PushError,
)
# Of sysexits.h, EX_TEMPFAIL: try again later.
EXIT_TIME_LIMIT = 75


def parse(arguments: list[str], *more: type, description: str = __doc__) -> Any:
    """The arguments of the command line over those of `--config`.

    Args:
        arguments: of the command line.
        *more: further dataclasses of arguments.
        description: for `--help`.

    Returns:
        `RunArguments`; with `more`, a tuple of them and one of each further dataclass.
    """
    recipe_parser = argparse.ArgumentParser(add_help=False)
    recipe_parser.add_argument("--config", help="A recipe: YAML with the arguments below as keys.")
    given, rest = recipe_parser.parse_known_args(arguments)
    parser = HfArgumentParser(
        (*ARGUMENTS, *more),
        description=description,
        parents=[recipe_parser],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if given.config is not None:
        take_recipe(parser, given.config)
    try:
        # The last one holds --config, which belongs to no dataclass.
        data, model, training, evaluation, *others, _ = parser.parse_args_into_dataclasses(rest)
        run_arguments = RunArguments(data, model, training, evaluation)
    except ValueError as error:
        if given.config is None:
            raise
        raise ValueError(f"{error} (the arguments are those of {given.config!r} and of the command line)") from error
    return (run_arguments, *others) if more else run_arguments


def take_recipe(parser: HfArgumentParser, path: str) -> None:
    """Give the parser a recipe's values as defaults; it ends as for an argument that is not known, with 2."""
    # The first of each: the one behind it, --no_<name>, takes no value.
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("config", "help")}
    try:
        recipe = read_recipe(path, known=actions)
        for key, value in recipe.items():
            # argparse itself reads a default that is text, as of 2e-3, and then names no file.
            if isinstance(value, str):
                parser._get_value(actions[key], value)
    except (ValueError, argparse.ArgumentError) as error:
        # A value may be text that cannot be printed.
        parser.error(f"{path}: {error}".encode(errors="backslashreplace").decode())
    parser.set_defaults(**recipe)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "fsspec", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        arguments = parse(sys.argv[1:])
        with Termination() as termination:
            run(arguments, termination=termination)
    except Terminated as terminated:
        print(terminated, file=sys.stderr)
        raise
    except TimeLimitReached as reached:
        print(reached, file=sys.stderr)
        sys.exit(EXIT_TIME_LIMIT)
    except ERRORS as error:
        logging.getLogger(__name__).debug("details", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
