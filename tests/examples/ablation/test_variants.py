from __future__ import annotations

import pytest
from runs import short_run

from ablation.variants import REFERENCE, TABLES, variants_of
from comparison.jobs import with_changes


def test_a_key_is_one_run_whatever_table_shows_it():
    by_key = {}
    for table in TABLES.values():
        for variant in table:
            run = (dict(variant.changes), variant.reuses_adapters, variant.needs)
            assert by_key.setdefault(variant.key, run) == run


def test_different_keys_are_different_runs():
    runs = {}
    for variant in variants_of(TABLES):
        run = (repr(sorted(variant.changes.items())), variant.reuses_adapters, variant.needs)
        assert runs.setdefault(run, variant.key) == variant.key


def test_every_change_is_an_argument_that_a_run_takes():
    for variant in variants_of(TABLES):
        arguments = with_changes(short_run(), dict(variant.changes))
        for name, value in variant.changes.items():
            parts = (arguments.data, arguments.model, arguments.training, arguments.evaluation)
            assert [getattr(part, name) for part in parts if hasattr(part, name)] == [value]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_brings_what_it_needs_first(table):
    keys = [variant.key for variant in variants_of([table])]
    assert keys[0] == REFERENCE
    assert len(keys) == len(set(keys))
    for variant in variants_of([table]):
        if variant.needs is not None:
            assert keys.index(variant.needs) < keys.index(variant.key)
        if variant.rate_of is not None:
            assert variant.rate_of in keys


def test_an_unknown_table_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"`tables` has 'rivlas', expected some of: 'functions', .*'solvers'"):
        variants_of(["functions", "rivlas"])


def test_only_the_variants_asked_and_what_they_need():
    keys = [variant.key for variant in variants_of(["layers", "rivals"], ["layers_important", "scale_shift"])]
    assert sorted(keys) == sorted([REFERENCE, "layers_important", "scale_shift", "vanilla_mul_all", "vanilla_mul"])
    with pytest.raises(ValueError, match="`variants` has 'shift', expected some of: 'funlora'"):
        variants_of(["rivals"], ["shift"])
