"""The command `funlora train`: a run from the command line. Also a module that launchers start:

accelerate launch -m funlora_hf.train --config cifar10_2-2 --seed 1
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import HfArgumentParser

from .continual.compilation import CompilationError
from .continual.config import ARGUMENTS, EvaluationArguments
from .continual.publishing import PushError
from .continual.termination import Terminated, Termination
from .continual.time_limit import TimeLimitReached
from .continual.trainer import NonFiniteLossError
from .evaluation.report import ForgettingError
from .recipes.reading import read_recipe, recipe_names
from .run import RunArguments, dry_run, run
from .utils.arguments import refuse_unknown, some_fields, tidy_help, warnings_as_lines
from .utils.locks import FolderInUseError


DESCRIPTION = "Train a generator class after class. Without arguments: scikit-learn's digits, two classes a task."
EXIT_CODES = (
    "exit codes: 0 finished; 75 (EX_TEMPFAIL) --time_limit_minutes is over, 143 SIGTERM has come, 130 Ctrl-C: after these three, "
    "--resume_from_checkpoint latest goes on; 1 an error; 2 an argument that is not known. Of a process that a launcher "
    "(torchrun, accelerate launch) has started, the launcher itself returns 1 for each but 0"
)
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


@dataclass
class DryRunArguments:
    """Whether to run at all."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: say what the run takes, and how long on this machine, after some ten seconds."
        },
    )


def parse(arguments: Sequence[str], *more: Any, description: str = DESCRIPTION, prog: str | None = None) -> Any:
    """The arguments of the command line over those of `--config`.

    Args:
        arguments: of the command line.
        *more: further dataclasses of arguments.
        description: for `--help`.
        prog: what the command is called; None: as the process.

    Returns:
        `RunArguments`; with `more`, a tuple of them and one of each further dataclass.
    """
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_parser.add_argument(
        "--config",
        help="A recipe: YAML with the arguments below as keys; a file, or a name that `funlora recipes` lists.",
    )
    given, rest = recipe_parser.parse_known_args(arguments)
    parts: Any = (*ARGUMENTS, *more)
    parser = HfArgumentParser(
        parts,
        prog=prog,
        # Not all options again at each error.
        usage="%(prog)s [-h] [--config RECIPE] [--OPTION VALUE ...]",
        description=description,
        epilog=EXIT_CODES,
        parents=[recipe_parser],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    if given.config is not None:
        take_recipe(parser, given.config)
    tidy_help(parser)
    try:
        # The last but one holds --config, which belongs to no dataclass.
        data, model, training, evaluation, *others, _, unknown = parser.parse_args_into_dataclasses(
            rest, return_remaining_strings=True, look_for_args_file=False
        )
        refuse_unknown(parser, unknown)
        run_arguments = RunArguments(data, model, training, evaluation)
    except ValueError as error:
        if given.config is None:
            raise
        raise ValueError(f"{error} (the arguments are those of {given.config!r} and of the command line)") from error
    name = parser.get_default("dataset_name")
    # The other recipes have "digits" and datasets on the Hub, with an owner.
    is_folder = given.config in recipe_names() and name == data.dataset_name != "digits" and "/" not in name
    if is_folder and not os.path.exists(name):
        raise ValueError(f"the recipe {given.config} needs --dataset_name FOLDER: there is no folder {name!r} here.")
    return (run_arguments, *others) if more else run_arguments


def take_recipe(parser: HfArgumentParser, path: str, names: Collection[str] | None = None) -> list[str]:
    """Give the parser a recipe's values as defaults; it ends as for an argument that is not known, with 2.

    Args:
        parser: that takes them.
        path: of the recipe, or its name.
        names: of the arguments to take; others of a run are left out. None: all that the parser knows, and no others.

    Returns:
        The keys left out.
    """
    # The first of each: the one behind it, --no_<name>, takes no value.
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("config", "help")}
    try:
        of_run = {one.name for part in ARGUMENTS for one in fields(part)}
        recipe = read_recipe(path, known=actions if names is None else of_run)
        left_out = [key for key in recipe if names is not None and key not in names]
        recipe = {key: value for key, value in recipe.items() if key not in left_out}
        for key, value in recipe.items():
            # argparse itself reads a default that is text, as of 2e-3, and then names no file.
            if isinstance(value, str):
                parser._get_value(actions[key], value)
    except (ValueError, argparse.ArgumentError) as error:
        # A value may be text that cannot be printed.
        parser.error(f"{path}: {error}".encode(errors="backslashreplace").decode())
    parser.set_defaults(**recipe)
    return left_out


def parse_evaluation(arguments: Sequence[str], *, prog: str | None = None) -> tuple[str, EvaluationArguments]:
    """The folder of a run, and how to evaluate it: as the run says, but for what the command line has."""
    of_run = {one.name for one in fields(EvaluationArguments)} - {"evaluation"}
    parts = some_fields(EvaluationArguments, of_run)
    parser = HfArgumentParser(
        parts,
        prog=prog,
        usage="%(prog)s [-h] RUN [--OPTION VALUE ...]",
        description="Evaluate a finished run, later or again: rewrites that part of its results.json, and its figures. "
        "The defaults are the run's. Of strategies whose generator changes, only its last state is evaluated.",
        epilog="exit codes: 0 done; 1 an error; 2 an argument that is not known",
        allow_abbrev=False,
    )
    tidy_help(parser)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    known, unknown = parser.parse_known_args(arguments)
    refuse_unknown(parser, unknown)
    parser.set_defaults(**{name: getattr(RunArguments.of(known.run).evaluation, name) for name in of_run})
    given, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return known.run, EvaluationArguments(**vars(given))


@warnings_as_lines()
def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """
    Run the command.

    Args:
        arguments (sequence of `str`, *optional*): None: those of the process.
        prog (`str`, *optional*): what it is called; None: as the process.

    Raises:
        SystemExit: for all but success, with a code of `EXIT_CODES` or the text of an error.
    """
    set_up_logging()
    try:
        given = sys.argv[1:] if arguments is None else arguments
        run_arguments, dry = parse(given, DryRunArguments, prog=prog)
        if dry.dry_run:
            print(dry_run(run_arguments))
            return
        with Termination() as termination:
            run(run_arguments, termination=termination)
    except Terminated as terminated:
        print(terminated, file=sys.stderr)
        raise
    except TimeLimitReached as reached:
        print(reached, file=sys.stderr)
        sys.exit(EXIT_TIME_LIMIT)
    except ERRORS as error:
        logging.getLogger(__name__).debug("details", exc_info=True)
        sys.exit(f"error: {error}")


def set_up_logging() -> None:
    """Messages of a run on stderr, without those of libraries that say much."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).handlers.clear()  # its messages reach the handler above, too
    for noisy in ("httpx", "httpx2", "fsspec", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
