"""The command `funlora personalize`: a run of concepts from the command line. Launchers can also start this module:

accelerate launch -m funlora_hf.personalization.command --strategy lora
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from ..continual.termination import Termination
from ..train import EXIT_CODES, exit_codes, set_up_logging
from ..utils.arguments import refuse_unknown, tidy_help, warnings_as_lines
from .arguments import CONCEPT_ARGUMENTS
from .run import ConceptRunArguments, personalize


DESCRIPTION = "Teach a text-to-image model concept after concept. Without arguments: the package's tiny base and its five concepts."


@warnings_as_lines()
def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Run the command; arguments and errors are those of `funlora_hf.train.main`."""
    set_up_logging()
    parser = HfArgumentParser(
        CONCEPT_ARGUMENTS,
        prog=prog,
        usage="%(prog)s [-h] [--OPTION VALUE ...]",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    tidy_help(parser)
    with exit_codes():
        given = sys.argv[1:] if arguments is None else list(arguments)
        *parts, unknown = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
        refuse_unknown(parser, unknown)
        with Termination() as termination:
            personalize(ConceptRunArguments(*parts), termination=termination)


if __name__ == "__main__":
    main()
