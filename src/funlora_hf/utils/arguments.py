"""Command lines: additions to argparse, and warnings as lines."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields, make_dataclass
from typing import Any, get_type_hints

from .checks import did_you_mean


def some_fields(kind: type, names: Collection[str]) -> Any:
    """Return a dataclass like `kind`, for `HfArgumentParser`, with only the fields in `names`."""
    hints = get_type_hints(kind)
    taken = [
        (one.name, hints[one.name], field(default=one.default, metadata=one.metadata))
        for one in fields(kind)
        if one.name in names
    ]
    # For the title in `--help`.
    title = {"_argument_group_name": getattr(kind, "_argument_group_name", None)}
    return make_dataclass(kind.__name__, taken, namespace=title)


def as_options(values: Mapping[str, Any]) -> str:
    """Return the options to type for these values of fields; for None, which cannot be typed, "no --<name>"."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            # `strategy_options` takes key=value, other fields take JSON.
            text = [f"{key}={json.dumps(one)}" for key, one in value.items()]
            value = text if name == "strategy_options" else [json.dumps(value)]
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    absent = [f"no --{name}" for name, value in values.items() if value is None]
    return ", ".join([shlex.join(words)] * bool(words) + absent)


def tidy_help(parser: argparse.ArgumentParser) -> None:
    """List each option of an `HfArgumentParser` only as --one_form, and say what each `--no_<name>` does.

    By default, it lists two spellings of each option, and `--no_<name>` has the help and the default of the option `--<name>`.
    """
    for action in parser._actions:
        action.option_strings = [one for one in action.option_strings if "-" not in one.lstrip("-")]
        if isinstance(action, argparse._StoreFalseAction):
            action.help, action.default = f"Switch off --{action.dest}.", argparse.SUPPRESS


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """End the process as argparse does, with 2, if a parser does not know some arguments; suggest the nearest options."""
    if unknown:
        options = [one for action in parser._actions for one in action.option_strings]
        hints = {did_you_mean(text.partition("=")[0], options): None for text in unknown if text.startswith("-")}
        # Some commands take the folder as a positional argument, others by this option.
        folders = [text for text in unknown if "--output_dir" in options and os.path.isdir(text)]
        hint = "".join([*hints, *(f" Did you mean --output_dir {shlex.quote(text)}?" for text in folders)])
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{'.' if hint else ''}{hint}")


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show each UserWarning as one line, as in the log, without its place in the code, until the context ends."""
    before = warnings.formatwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        # Not its subclasses, such as deprecations.
        if category is not UserWarning:
            return before(message, category, filename, lineno, line)
        return f"WARNING {' '.join(str(message).split())}\n"

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before
