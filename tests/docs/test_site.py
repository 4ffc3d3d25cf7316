"""Links of README and docs resolve; the API reference has every public name, once. `make docs` checks the rest."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from runs import REPOSITORY


DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
PUBLIC = ("tuner", "baselines", "flow_matching", "layer_selection", "sampling", "adapters", "hub", "data", "run")


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_internal_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        found = page.parent / target if target else page
        assert found.is_file(), link
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), link


def resolved(path: str) -> object:
    return pkgutil.resolve_name(path)


def public_names(module: str) -> dict[str, object]:
    """What a module exports, or else defines."""
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None)
    if names is None:
        names = [n for n, v in vars(found).items() if n[0] != "_" and getattr(v, "__module__", None) == module]
    return {f"{module}.{name}": getattr(found, name) for name in names}


def test_the_reference_has_every_public_name_once():
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))
    paths = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    documented = {id(resolved(path)) for path in paths}
    assert len(documented) == len(paths)
    public = {}
    for module in ("funlora_hf", *(f"funlora_hf.{room}" for room in PUBLIC)):
        public |= public_names(module)
    assert [name for name, value in public.items() if id(value) not in documented] == []


def test_the_index_of_the_reference_names_what_its_pages_show():
    index = (DOCS / "reference" / "README.md").read_text(encoding="utf-8")
    for page, names in re.findall(r"^\| \[[^]]*\]\((\w+\.md)\) \| (.*) \|$", index, re.MULTILINE):
        shown = re.findall(
            r"^::: (?:\w+\.)*(\w+)$", (Path(DOCS) / "reference" / page).read_text(encoding="utf-8"), re.MULTILINE
        )
        assert re.findall(r"`(\w+)`", names) == shown, page
