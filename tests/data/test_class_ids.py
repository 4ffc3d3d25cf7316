from __future__ import annotations

import re
import unicodedata

import pytest

from funlora_hf.data import assign_class_ids
from funlora_hf.data.class_ids import ordered_class_ids


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


CLASSES = {0: "cat", 1: "dog", 2: "0", 7: "émeu"}


def test_classes_are_ordered_by_id_or_name():
    # "0" is an id before it is a name; names are compared in one Unicode form.
    assert ordered_class_ids(["e\u0301meu", "2", "dog", "0"], CLASSES) == [7, 2, 1, 0]


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (["cat", "dgo"], "`class_order` has 'dgo', which is not a class of the dataset. Did you mean 'dog'?"),
        (["cat", "dog", "2", "cat", "7"], "holds [0] more than once"),
        (["cat", "dog"], "`class_order` leaves out '0', 'émeu': give each class once"),
    ],
)
def test_an_order_has_each_class_once(order, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        ordered_class_ids(order, CLASSES)
