"""Command lines: what argparse leaves out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .checks import did_you_mean


def explain_switches(parser: argparse.ArgumentParser) -> None:
    """Say what each `--no_<name>` does. HfArgumentParser gives it the help and the default of the option that it switches off."""
    for action in parser._actions:
        if isinstance(action, argparse._StoreFalseAction):
            action.help, action.default = f"Switch off --{action.dest}.", argparse.SUPPRESS


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """End the process as argparse does, with 2, if there are arguments that a parser does not know; suggest the nearest options."""
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        hints = {did_you_mean(text.partition("=")[0], options): None for text in unknown if text.startswith("-")}
        hint = "".join(hints)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{'.' if hint else ''}{hint}")
