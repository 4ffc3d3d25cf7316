from __future__ import annotations

import pytest

from comparison.concept_choices import Choice, check


def test_a_choice_knows_options_of_the_strategy_from_arguments_of_the_run():
    choice = Choice.parse("clora:penalty=10,rank=2,target_modules=kv+cross,label=weak")
    assert (choice.name, choice.label) == ("clora", "weak")
    expected = "--strategy clora --strategy_options penalty=10 --rank 2 --target_modules kv cross"
    assert choice.options() == expected.split()
    assert Choice.parse("lora") == Choice("lora", "lora")


@pytest.mark.parametrize(
    ("texts", "shared", "error"),
    [
        (["clora:penalty"], [], "'penalty', expected 'name:key=value"),
        (["nothing"], [], "`strategy` is 'nothing'"),
        (["lora", "lora"], [], "have one label: add label="),
        (["clora:penalty=much"], [], "`penalty`"),
        (["lora"], ["--seed", "1"], "--seed is given for all runs"),
        (["textual_inversion"], ["--concept_train_steps", "0"], "`concept_train_steps` should be a positive integer"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(texts, shared, error):
    with pytest.raises(ValueError, match=error):
        check([Choice.parse(text) for text in texts], shared)
