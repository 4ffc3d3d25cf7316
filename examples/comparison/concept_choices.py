"""Which strategies of concepts to compare: as short texts, and as arguments of `funlora personalize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from comparison.choices import LABEL, check_different, split_entry
from funlora_hf.personalization.arguments import CONCEPT_ARGUMENTS
from funlora_hf.personalization.run import ConceptRunArguments
from funlora_hf.personalization.strategies.registry import concept_strategy
from funlora_hf.utils.arguments import refuse_unknown


_OWNED = ("--seed", "--strategy", "--strategy_options", "--output_dir", "--resume_from_checkpoint")


@dataclass(frozen=True)
class Choice:
    """A strategy to compare: its name, what tables call it, and what its runs have of their own."""

    name: str
    label: str
    arguments: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read `name:key=value,...`; raises a ValueError for an unknown name or a part that is no key=value."""
        name, given = split_entry(text)
        concept_strategy(name)
        return cls(name, given.pop(LABEL, text), given)

    @property
    def rate_argument(self) -> str:
        """Which rate is chosen: that of its layers, or of the token if it trains nothing else."""
        return "concept_learning_rate" if concept_strategy(self.name).rates else "token_learning_rate"

    def default_rate(self, *, tiny: bool) -> float:
        """Return that rate's default."""
        strategy = concept_strategy(self.name)
        rates = strategy.rates or strategy.token_rates
        return rates.tiny if tiny else rates.other

    def options(self) -> list[str]:
        """Return these arguments as those of the command."""
        own = concept_strategy(self.name).known_options()
        of_strategy = [f"{key}={value}" for key, value in self.arguments.items() if key in own]
        others = [
            word for key, value in self.arguments.items() if key not in own for word in (f"--{key}", *value.split("+"))
        ]
        return ["--strategy", self.name, *(["--strategy_options", *of_strategy] if of_strategy else []), *others]


def check(choices: Sequence[Choice], shared: Sequence[str]) -> ConceptRunArguments:
    """Return the arguments that all runs share, after a check of each strategy's, before anything runs."""
    labels = [choice.label for choice in choices]
    check_different("label", labels, labels, "have one label: add label=... to one")
    for owned in _OWNED:
        if owned in shared:
            raise ValueError(f"{owned} is given for all runs, expected none: the comparison sets it.")
    if "--push_to_hub" in shared:
        raise ValueError(
            "--push_to_hub is given, but the runs of a comparison cannot share a repository: compare, then `funlora push` one."
        )
    parser = HfArgumentParser(CONCEPT_ARGUMENTS, allow_abbrev=False)
    for options in ([], *(choice.options() for choice in choices)):
        *parts, unknown = parser.parse_args_into_dataclasses(
            [*shared, *options], return_remaining_strings=True, look_for_args_file=False
        )
        refuse_unknown(parser, unknown)
        arguments = ConceptRunArguments(*parts)
    return arguments
