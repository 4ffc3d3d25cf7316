from __future__ import annotations

import unicodedata

import pytest

from funlora_hf.data import assign_class_ids


def test_new_ids_avoid_those_that_are_taken():
    assert assign_class_ids(["c", "a", "d"], {0: "a", 1: "b"}, taken=[2, 5]) == [6, 0, 7]
    assert assign_class_ids(["c"], {}, taken=[3]) == [4]


def test_a_name_is_known_in_whatever_unicode_form():
    composed, decomposed = unicodedata.normalize("NFC", "caf\u00e9"), unicodedata.normalize("NFD", "caf\u00e9")
    assert composed != decomposed
    assert assign_class_ids([decomposed], {3: composed}) == [3]
    assert assign_class_ids([composed, "x"], {3: decomposed}) == [3, 4]
    with pytest.raises(ValueError, match="more than once"):
        assign_class_ids([composed, decomposed], {})
