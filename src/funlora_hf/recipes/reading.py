"""Read YAML from untrusted sources: recipes, and values of the command line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from ..utils.checks import did_you_mean, shortened


# The folder of the package's recipes.
_FOLDER = Path(__file__).parent
# A recipe has about 2 kB; PyYAML's time grows with the length.
MOST_BYTES = 2**16


class _Loader(yaml.SafeLoader):
    """Loads YAML, but refuses aliases, which can make gigabytes out of a few lines, and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "it has an alias, expected the value itself", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = sorted(key for key, count in keys.items() if count > 1)
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"it has {', '.join(map(repr, twice))} twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def load_yaml(text: str | bytes) -> Any:
    """
    Return the value of plain YAML: numbers, text, lists and mappings. It runs no code and creates no other objects.

    Raises:
        ValueError: the text is not plain YAML, has an alias or a duplicate key, or is longer than `MOST_BYTES`.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text)} bytes, expected {MOST_BYTES} at most")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    # PyYAML does not catch the errors of int(), float(), dates and base64.
    except Exception as error:
        raise ValueError(shortened(" ".join(str(error).split()), 300)) from error


def recipe_names() -> list[str]:
    """Return the names of the package's recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_recipe(given: str | os.PathLike) -> Path:
    """
    Return the file of a recipe: `given` if there is such a file, otherwise the package's recipe with this name.

    Raises:
        FileNotFoundError: there is no such file or recipe; the error lists the names.
    """
    given, names = os.fspath(given), recipe_names()
    if given in names and not Path(given).is_file():
        return _FOLDER / f"{given}.yaml"
    if not Path(given).exists():
        raise FileNotFoundError(
            f"`config` is {given!r}, but there is no such file, and no such recipe.{did_you_mean(Path(given).stem, names)} "
            f"Give a YAML file, or one of the recipes {', '.join(names)}."
        )
    return Path(given)


def read_recipe(path: str | os.PathLike, known: Collection[str]) -> dict[str, Any]:
    """
    Return the arguments in a recipe, which is a YAML file with a mapping or a name of `recipe_names`; an empty file has none.

    Raises:
        FileNotFoundError: no such file or name.
        ValueError: the file cannot be read, is not YAML or not a mapping, or has a key that is not in `known`; it names the file.
    """
    path, found = os.fspath(path), find_recipe(path)
    try:
        # One more byte shows that a file is too long, without reading all of it.
        with open(found, "rb") as file:
            recipe = load_yaml(file.read(MOST_BYTES + 1))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`config` {path!r} is not a recipe: {error}. Expected a YAML file of keys and values."
        ) from error
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        kind = "text" if isinstance(recipe, str) else f"a {type(recipe).__name__}"
        raise ValueError(f"`config` {path!r} holds {kind}, expected a mapping: one `key: value` on each line.")
    unknown = sorted(str(key) for key in recipe if key not in known)
    if unknown:
        named = shortened(", ".join(map(repr, unknown)), 300)
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"`config` {path!r} has unknown keys {named}; --help lists the known ones.{hint}")
    return recipe
