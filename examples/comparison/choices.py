"""Which strategies to compare, as short texts: "name:option=value,argument=value"."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from funlora_hf.continual.config import ContinualTrainingArguments, EvaluationArguments, ModelArguments, parse_value
from funlora_hf.continual.strategies.registry import strategy_class
from funlora_hf.evaluation.tables import OUTSIDE_DATA


LABEL = "label"
# Arguments that all runs share or that the comparison sets. Those of the data are no choice either: other tasks or
# images would be no comparison.
NO_CHOICE = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "strategy",
    "strategy_options",
    "seed",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_license",
    "update_class",
    "update_mode",
    "report_to",
    "time_limit_minutes",
    "joint_results",
}
# Longer names of folders meet the limits of file systems and of readers.
_LONGEST_KEY = 80


@dataclass(frozen=True)
class Choice:
    """One strategy of a comparison.

    Args:
        name: of the strategy.
        options: those of the strategy itself.
        arguments: of the run, in place of the ones that all share.
        label: in tables and figures.
        key: names its folders; different choices have different keys.
    """

    name: str
    options: Mapping[str, Any]
    arguments: Mapping[str, Any]
    label: str
    key: str

    def changes(self) -> dict[str, Any]:
        """Its run's arguments, where they differ from those that all share."""
        own = {"strategy_options": dict(self.options)} if self.options else {}
        return {"strategy": self.name, **self.arguments, **own}

    def generator(self) -> Choice:
        """The choice whose generator this one's is: only the classifier of guide differs from that of replay."""
        if self.name != "guide":
            return self
        known = strategy_class("replay").known_options()
        return _choice("replay", {key: self.options[key] for key in self.options if key in known}, self.arguments)


def parse_choices(entries: Sequence[str]) -> list[Choice]:
    """The strategies that texts choose.

    Args:
        entries: each a strategy's name, or "name:key=value,key=value". A key is an option of the strategy, an argument
            of the run, or "label" for what tables and figures call it; values are YAML.

    Returns:
        One choice an entry, in their order.

    Raises:
        ValueError: no entry, one twice or two of one label, an unknown strategy or key, or a value that the strategy
            does not take.
    """
    if isinstance(entries, str) or not entries:
        raise ValueError(f"`strategies` is {entries!r}, expected a list of at least one strategy, such as 'funlora'.")
    choices = [_parse(entry) for entry in entries]
    check_different("key", [choice.key for choice in choices], entries, "are the same run: name it once")
    check_different("label", [choice.label for choice in choices], entries, "have one label: give them different ones")
    return choices


def split_entry(entry: str, field: str = "strategies") -> tuple[str, dict[str, str]]:
    """The name, and the texts of the values by key; raises a ValueError for a part that is no key=value."""
    name, _, rest = str(entry).partition(":")
    texts: dict[str, str] = {}
    # A comma inside a value, as of a list, is not followed by a key.
    for part in re.split(r",(?=\s*\w+\s*=)", rest) if rest.strip() else []:
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not (key and equals and text):
            raise ValueError(f"`{field}` has {entry!r} with {part!r}, expected 'name:key=value,key=value'.")
        if key in texts:
            raise ValueError(f"`{field}` has {entry!r} with {key!r} twice, expected it once.")
        texts[key] = text
    return name, texts


def check_different(
    what: str, values: Sequence[str], entries: Sequence[str], problem: str, field: str = "strategies"
) -> None:
    """Raise a ValueError that says what the problem is, if two entries have the same value."""
    for value in values:
        same = [entry for entry, own in zip(entries, values, strict=True) if own == value]
        if len(same) > 1:
            raise ValueError(f"`{field}` has {', '.join(map(repr, same))}, which {problem} ({what} {value!r}).")


def _parse(entry: str) -> Choice:
    name, texts = split_entry(entry)
    strategy_cls = strategy_class(name, texts)
    known_options = strategy_cls.known_options()
    known_arguments = [
        field.name
        for part in (ModelArguments, ContinualTrainingArguments, EvaluationArguments)
        for field in fields(part)
        if field.name not in NO_CHOICE
    ]
    label = texts.pop(LABEL, None)
    options, arguments = {}, {}
    for key, text in texts.items():
        if key in known_options:
            options[key] = yaml_value(entry, key, text)
        elif key in known_arguments:
            arguments[key] = yaml_value(entry, key, text)
        else:
            raise ValueError(
                f"`strategies` has {entry!r} with {key!r}, expected {LABEL!r}, an option of {name!r} "
                f"({', '.join(known_options) or 'it has none'}) or an argument of its run ({', '.join(known_arguments)})."
            )
    try:
        strategy_cls.make_options(options)
    except ValueError as error:
        raise ValueError(f"`strategies` has {entry!r}, which is not possible: {error}") from error
    shown = ", ".join(f"{key}={text}" for key, text in texts.items())
    label = label or (f"{name} ({shown})" if shown else name)
    if strategy_cls.outside_data:
        # In place of the U-Net that the others share, it has the one of its option.
        label, arguments = f"{label}{OUTSIDE_DATA}", {"unet_config": None, **arguments}
    return _choice(name, options, arguments, label)


def _choice(name: str, options: Mapping[str, Any], arguments: Mapping[str, Any], label: str | None = None) -> Choice:
    return Choice(name, options, arguments, label or name, folder_key(name, {**options, **arguments}))


def yaml_value(entry: str, key: str, text: str, field: str = "strategies") -> Any:
    """The value of a key's text; raises a ValueError for what is no YAML."""
    try:
        return parse_value(text)
    except ValueError as error:
        raise ValueError(f"`{field}` has {entry!r}, where {key!r} is not valid YAML: {text!r}.") from error


def folder_key(name: str, values: Mapping[str, Any]) -> str:
    """A name for folders: readable, safe in every file system, different for different values."""
    if not values:
        return name
    exact = json.dumps(values, sort_keys=True, default=str)
    parts = "_".join(f"{key}-{value}" for key, value in sorted(values.items()))
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}_{parts}")
    # What was replaced, and what a type was, is told apart by the hash.
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{readable[:_LONGEST_KEY]}_{digest}"
