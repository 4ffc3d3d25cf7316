"""The command `funlora train`: a run from the command line. Launchers can also start this module:

accelerate launch -m funlora_hf.train --config cifar10_2-2 --seed 1
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
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


DESCRIPTION = "Train a generator class after class. Without arguments: scikit-learn's digits, two classes per task."
EXIT_CODES = (
    "exit codes: 0 finished; 75 (EX_TEMPFAIL) --time_limit_minutes is over, 143 SIGTERM, 130 Ctrl-C: after these three, "
    "--resume_from_checkpoint latest resumes the run; 1 an error; 2 an unknown argument. If a launcher (torchrun, "
    "accelerate launch) has started the process, the launcher returns 1 for all of these except 0"
)
# Errors whose message is enough, without a traceback.
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
# EX_TEMPFAIL in sysexits.h: try again later.
EXIT_TIME_LIMIT = 75


@dataclass
class DryRunArguments:
    """Argument of `funlora train` that replaces the run by a dry run."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: print what the run costs, and how long it takes on this machine, after about ten seconds."
        },
    )


def parse(arguments: Sequence[str], *more: Any, description: str = DESCRIPTION, prog: str | None = None) -> Any:
    """Parse the command line; its arguments take precedence over those of `--config`.

    Args:
        *more: further dataclasses of arguments.
        description: for `--help`.
        prog: name of the command; None: the name of the process.

    Returns:
        `RunArguments`; with `more`, a tuple of `RunArguments` and an instance of each further dataclass.
    """
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_parser.add_argument(
        "--config",
        help="A recipe (YAML with the arguments below as keys): a file, or a name that `funlora recipes` lists.",
    )
    given, rest = recipe_parser.parse_known_args(arguments)
    parts: Any = (*ARGUMENTS, *more)
    parser = HfArgumentParser(
        parts,
        prog=prog,
        # Do not print all options at each error.
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
        # The second to last contains --config, which belongs to no dataclass.
        data, model, training, evaluation, *others, _, unknown = parser.parse_args_into_dataclasses(
            rest, return_remaining_strings=True, look_for_args_file=False
        )
        refuse_unknown(parser, unknown)
        run_arguments = RunArguments(data, model, training, evaluation)
    except ValueError as error:
        if given.config is None:
            raise
        raise ValueError(f"{error} (the arguments come from {given.config!r} and the command line)") from error
    name = parser.get_default("dataset_name")
    # The other recipes have "digits" or a dataset on the Hub, with an owner.
    is_folder = given.config in recipe_names() and name == data.dataset_name != "digits" and "/" not in name
    if is_folder and not os.path.exists(name):
        raise ValueError(f"the recipe {given.config} needs --dataset_name FOLDER: there is no folder {name!r} here.")
    return (run_arguments, *others) if more else run_arguments


def take_recipe(parser: HfArgumentParser, path: str, names: Collection[str] | None = None) -> list[str]:
    """Make a recipe's values the defaults of a parser, and return the keys that are left out.

    An invalid recipe ends the process with 2, like an unknown argument.

    Args:
        path: path or name of the recipe.
        names: names of the arguments to take; other arguments of a run are left out. None: all arguments of the parser, and any
            other key is an error.
    """
    # The first action of each name: the second one, --no_<name>, takes no value.
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("config", "help")}
    try:
        of_run = {one.name for part in ARGUMENTS for one in fields(part)}
        recipe = read_recipe(path, known=actions if names is None else of_run)
        left_out = [key for key in recipe if names is not None and key not in names]
        recipe = {key: value for key, value in recipe.items() if key not in left_out}
        for key, value in recipe.items():
            # argparse itself would convert a default that is text, such as 2e-3, and its error would not name the file.
            if isinstance(value, str):
                parser._get_value(actions[key], value)
    except (ValueError, argparse.ArgumentError) as error:
        # A value may contain characters that cannot be printed.
        parser.error(f"{path}: {error}".encode(errors="backslashreplace").decode())
    parser.set_defaults(**recipe)
    return left_out


def parse_evaluation(arguments: Sequence[str], *, prog: str | None = None) -> tuple[str, EvaluationArguments]:
    """Return the folder of a run and the settings of its evaluation: the command line's, otherwise the run's."""
    of_run = {one.name for one in fields(EvaluationArguments)} - {"evaluation"}
    parts = some_fields(EvaluationArguments, of_run)
    parser = HfArgumentParser(
        parts,
        prog=prog,
        usage="%(prog)s [-h] RUN [--OPTION VALUE ...]",
        description="Evaluate a finished run, later or again: rewrite the evaluation in its results.json, and its figures. "
        "The defaults are the run's settings. If the strategy changes its generator, only its last state is evaluated.",
        epilog="exit codes: 0 done; 1 an error; 2 an unknown argument",
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
    """Run the command.

    Args:
        arguments (sequence of `str`, *optional*): arguments of the command; None: the arguments of the process.
        prog (`str`, *optional*): name of the command; None: the name of the process.

    Raises:
        SystemExit: the command did not succeed; it has a code of `EXIT_CODES` or the text of an error.
    """
    set_up_logging()
    with exit_codes():
        given = sys.argv[1:] if arguments is None else arguments
        run_arguments, dry = parse(given, DryRunArguments, prog=prog)
        if dry.dry_run:
            print(dry_run(run_arguments))
            return
        with Termination() as termination:
            run(run_arguments, termination=termination)


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process with a code of `EXIT_CODES`, or with the text of an error, if the block raises one that its text explains."""
    try:
        yield
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
    """Log the messages of a run to stderr, without the messages of libraries that log a lot."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).handlers.clear()  # its messages also reach the handler above
    for noisy in ("httpx", "httpx2", "fsspec", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
