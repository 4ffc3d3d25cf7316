"""Which concepts are drawn together; what is measured of them, test_run.py tests."""

from __future__ import annotations

from dataclasses import replace

from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.evaluator import pairs_with_prompts


def test_neighbours_are_drawn_together():
    concepts = dict(enumerate(load_concepts("tiny")))
    found = dict(pairs_with_prompts(concepts))
    assert list(found) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert found[0, 1] == "a photo of a <new1> toy and a <new2> badge"


def test_a_style_is_drawn_with_each_subject_whenever_it_is_learned():
    toy, badge, shore = load_concepts("tiny_domain")
    first = dict(pairs_with_prompts({2: shore, 0: toy, 1: badge}))
    assert list(first) == [(2, 0), (2, 1), (0, 1)]
    last = dict(pairs_with_prompts({0: toy, 1: badge, 2: shore}))
    assert list(last) == [(0, 1), (0, 2), (1, 2)]
    assert first[2, 0] == last[0, 2] == "a <new6> photo of a <new1> toy on a gray background"
    other = replace(shore, token="<new7>")
    assert list(dict(pairs_with_prompts({0: toy, 1: shore, 2: other}))) == [(0, 1), (0, 2)]
