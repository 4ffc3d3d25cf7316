"""`classes.json`: what a repository holds, from which the card at its root is made, and made again when a class comes or goes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..cards.model_cards import ClassRow, adapters_card, base_card


INDEX = "classes.json"
CARD = "README.md"
# Of results.json, what a card shows.
_SHOWN = ("dataset", "seed", "LA", "AIA", "tasks", "class_order", "class_accuracy", "versions", "settings")
_KINDS = {"classes": list, "base_classes": dict, "base_fingerprint": dict, "results": dict}


@dataclass(frozen=True)
class HubIndex:
    """
    What a repository holds.

    Args:
        base_model: repository of the base, "user/repo"; None: unknown.
        base_revision: branch, tag or commit of the base.
        base_classes: id -> name, if the base is in this repository; else None.
        base_fingerprint: of the base in this repository, by precision.
        adapters: link -> row of each class that an adapter makes.
        results: what the card shows of the results.json of the run.
        license: identifier of a licence.
    """

    base_model: str | None = None
    base_revision: str | None = None
    base_classes: Mapping[int, str] | None = None
    base_fingerprint: Mapping[str, str] | None = None
    adapters: Mapping[str, ClassRow] = field(default_factory=dict)
    results: Mapping[str, Any] | None = None
    license: str | None = None

    def updated(self, new: HubIndex) -> HubIndex:
        """With what `new` knows; what it does not know stays, a base that this repository holds too."""
        kept = {name: value for name, value in vars(new).items() if value is not None and name != "adapters"}
        if self.base_classes is not None and new.base_classes is None:
            kept.pop("base_model", None)
            kept.pop("base_revision", None)
        return replace(self, **kept, adapters={**self.adapters, **new.adapters})

    def only(self, links: Iterable[str]) -> HubIndex:
        """With those adapters alone."""
        links = set(links)
        return replace(self, adapters={link: row for link, row in self.adapters.items() if link in links})

    def without(self, class_label: int) -> HubIndex:
        """Without a class, wherever it is named."""
        adapters = {link: row for link, row in self.adapters.items() if row.class_label != class_label}
        return replace(self, adapters=adapters, results=results_without(self.results, {class_label}))

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The card and this index, as the repository `repo_id` shows them."""
        rows = sorted(self.adapters.values(), key=lambda row: row.class_label)
        shared = {"repo_id": repo_id, "results": self.results, "license": self.license}
        if self.base_classes is None:
            card = adapters_card(base=self.base_model, base_revision=self.base_revision, classes=rows, **shared)
        else:
            accuracy = (self.results or {}).get("class_accuracy") or {}
            own = [
                ClassRow(label, name, "base", None, None, accuracy.get(str(label)), None)
                for label, name in self.base_classes.items()
            ]
            card = base_card(classes=[*own, *rows], base_fingerprints=self.base_fingerprint, **shared)
        contents = {
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "base_classes": self.base_classes,
            "base_fingerprint": self.base_fingerprint,
            "classes": [asdict(row) for row in rows],
            "results": self.results,
            "license": self.license,
        }
        return {CARD: str(card).encode(), INDEX: (json.dumps(contents, indent=2) + "\n").encode()}


def shown_results(results: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a card shows of a run's results; no text with a path of this machine in it."""
    if results is None:
        return None
    shown = {name: results[name] for name in _SHOWN if name in results}
    shown["settings"] = {
        part: {name: value for name, value in fields.items() if _is_plain(value)}
        for part, fields in shown.get("settings", {}).items()
    }
    return shown


def results_without(results: Mapping[str, Any] | None, class_labels: Collection[int]) -> dict[str, Any] | None:
    """A run's results with some classes left out wherever a card would name them."""
    if results is None:
        return None
    kept = dict(results)
    if "tasks" in kept:
        kept["tasks"] = [[c for c in task if c not in class_labels] for task in kept["tasks"]]
    if "class_order" in kept:
        kept["class_order"] = [c for c in kept["class_order"] if c not in class_labels]
    if kept.get("class_accuracy"):
        gone = set(map(str, class_labels))
        kept["class_accuracy"] = {key: value for key, value in kept["class_accuracy"].items() if key not in gone}
    return kept


def read_index(text: str) -> HubIndex:
    """
    The index in a file.

    Raises:
        ValueError: not one that `HubIndex.files` has written.
    """
    try:
        given = json.loads(text)
        for name, kind in _KINDS.items():
            if given[name] is not None and not isinstance(given[name], kind):
                raise ValueError(f"`{name}` is {given[name]!r}")
        rows = [ClassRow(**row) for row in given["classes"]]
        classes = given["base_classes"]
        return HubIndex(
            base_model=given["base_model"],
            base_revision=given["base_revision"],
            base_classes=None if classes is None else {int(label): str(name) for label, name in classes.items()},
            base_fingerprint=given["base_fingerprint"],
            adapters={row.link: row for row in rows},
            results=given["results"],
            license=given["license"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{INDEX} is damaged ({error!r}): delete it, and push again.") from error


def _is_plain(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (bool, int, float))
        or (isinstance(value, str) and not set(value) & set("/\\"))
    )
