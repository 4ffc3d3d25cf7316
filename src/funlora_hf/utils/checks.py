"""Check single arguments, and make short texts for error messages."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import TypeGuard

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


# Precisions in which bases are loaded.
FINGERPRINT_DTYPES = ("float32", "bfloat16", "float16")
# Further key in the fingerprints of a base: the hash of its config.
CONFIG_FINGERPRINT = "config"
_SHA256 = re.compile("[0-9a-f]{64}")
# Longer class names are a mistake or an attack.
MOST_NAME_CHARACTERS = 1000
# Limits of a list of problems: lines, and characters per line, since names from a file may have any length.
_MOST_LINES = 10
_MOST_CHARACTERS = 300


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{field}` is {value!r}, expected one of: {', '.join(map(repr, choices))}.")


def check_at_least_one(field: str, value: object) -> None:
    """Raise a ValueError unless `value` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        shown = shortened(repr(value), 100)
        raise ValueError(f"`{field}` should be a positive integer value but the value passed is {shown}.")


def check_class_label(value: object, *, field: str = "class_label") -> None:
    """Raise a ValueError unless `value` is None or a class id: an integer from 0 to torch's largest integer."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63):
        shown = shortened(repr(value), 100)
        raise ValueError(f"`{field}` is {shown}, expected an id from 0 to 2**63 - 1, or None.")


def check_class_name(value: object) -> None:
    """Raise a ValueError unless `value` is None or the name of a class: text that can be encoded, not blank, not too long."""
    if value is None:
        return
    if not isinstance(value, str):
        problem = f"a {type(value).__name__}"
    elif not value.strip():
        problem = "blank"
    elif len(value) > MOST_NAME_CHARACTERS:
        problem = f"of {len(value)} characters"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        problem = "with half a surrogate pair in it"
    else:
        return
    raise ValueError(
        f"`class_name` is {shortened(repr(value), 100)}, {problem}, expected text of at most {MOST_NAME_CHARACTERS} "
        "characters."
    )


def one_form(name: str) -> str:
    """Return the form of a class's name for comparisons: letters with marks have several Unicode forms that look alike."""
    return unicodedata.normalize("NFC", name)


def is_repository_name(name: str) -> bool:
    """Whether a repository on the Hub may have this name; other names are never requested from the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_not_mistyped(field: str, name: str, *, revision: str | None = None) -> None:
    """Raise a FileNotFoundError if `name` does not exist here but a folder, or a file of the same type, with a similar name does.

    Such a name is probably mistyped, and is not requested from the Hub, unless a revision says that it is a repository.
    """
    place = Path(name)
    known = [] if revision or place.exists() else place.parent.glob("*")
    near = [one.name for one in known if one.is_dir() or one.suffix == place.suffix != ""]
    if nearest := get_close_matches(place.name, near, n=1, cutoff=0.8):
        raise FileNotFoundError(
            f"{field}: nothing here has this name; did you mean {str(place.parent / nearest[0])!r}? (If it is on the Hub, also give its "
            "revision, such as 'main'.)"
        )


def expanded(field: str, path: str) -> str:
    """Replace a ~ at the start of a path, which a shell leaves in --option=~/path, by the user's folder.

    Raises:
        ValueError: ~ is followed by a name that no user has.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f"`{field}` is {path!r}, but there is no such user: write the full path.")
    return found


def check_type(name: str, value: object, expected: type | UnionType, text: str) -> None:
    """Raise a ValueError unless `value` has the type `expected`, which the error calls `text`."""
    if not isinstance(value, expected):
        raise ValueError(f"`{name}` is {value!r}, expected {text}.")


def check_names(name: str, value: object, *, single: bool) -> None:
    """Raise a ValueError unless `value` is a list of strings, None or, with `single`, one string."""
    if value is None or (single and isinstance(value, str)):
        return
    if not _is_several(value) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"`{name}` is {value!r}, expected {'a regex, ' if single else ''}a list of names, or None.")


def check_layer_indexes(value: object) -> None:
    """Raise a ValueError unless `value` is an integer, a list of integers, or None."""
    entries = value if _is_several(value) else [value]
    if value is not None and not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
        raise ValueError(f"`layers_to_transform` is {value!r}, expected an index, a list of indexes, or None.")


def check_fingerprint(value: object) -> None:
    """Raise a ValueError unless `value` is None or a SHA-256 for some of `FINGERPRINT_DTYPES` and "config"."""
    if value is not None and not (
        isinstance(value, Mapping)
        and value
        and value.keys() <= {*FINGERPRINT_DTYPES, CONFIG_FINGERPRINT}
        and all(isinstance(entry, str) and _SHA256.fullmatch(entry) for entry in value.values())
    ):
        raise ValueError(
            f"`base_fingerprint` is {value!r}, expected 64 hexadecimal digits for each of "
            f"{', '.join(map(repr, (*FINGERPRINT_DTYPES, CONFIG_FINGERPRINT)))}, or None: see `base_fingerprints`."
        )


def check_started_from(value: object) -> None:
    """Raise a ValueError unless `value` is None or has names of adapters and the SHA-256 of the file of each."""
    if value is not None and not (
        isinstance(value, Mapping)
        and value
        and all(isinstance(name, str) and name.isprintable() and name.strip() for name in value)
        and all(isinstance(entry, str) and _SHA256.fullmatch(entry) for entry in value.values())
    ):
        raise ValueError(
            f"`started_from` is {shortened(repr(value), _MOST_CHARACTERS)}, expected 64 hexadecimal digits for the name of each "
            "adapter, or None: see `start_from`."
        )


def _is_several(value: object) -> TypeGuard[Sequence[object] | Set[object]]:
    return isinstance(value, (Sequence, Set)) and not isinstance(value, str)


def shortened(text: str, length: int) -> str:
    """Return the text, without its middle if it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the known words that are nearest to a text; empty if none is near.

    Known words that contain the text come before similar ones.
    """
    known, part = list(known), text.strip("-")
    containing = [one for one in known if len(part) > 2 and part in one]
    nearest = get_close_matches(text, containing, n=4, cutoff=0) or get_close_matches(text, known, n=1)
    return f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def listed(problems: Iterable[str]) -> str:
    """Return the problems as a sorted list without duplicates, at most ten lines."""
    lines = [f"- {shortened(problem, _MOST_CHARACTERS)}" for problem in sorted(set(problems))]
    more = len(lines) - _MOST_LINES
    return "\n".join(lines if more <= 0 else [*lines[:_MOST_LINES], f"- and {more} more"])
