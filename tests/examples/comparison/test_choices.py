from __future__ import annotations

import re

import pytest

from comparison.choices import parse_choices
from funlora_hf.continual.strategies.registry import STRATEGIES


def test_a_name_is_a_choice():
    for name in STRATEGIES:
        (choice,) = parse_choices([name])
        assert (choice.name, choice.label, choice.key) == (name, name, name)
        assert choice.changes() == {"strategy": name}


def test_keys_go_to_the_strategy_or_to_the_run():
    (choice,) = parse_choices(["merge_orthogonal:merge=svd, rank=2 ,orthogonal=released,adapter_learning_rate=2e-3"])
    assert choice.options == {"merge": "svd", "orthogonal": "released"}
    assert choice.arguments == {"rank": 2, "adapter_learning_rate": 0.002}
    assert choice.changes() == {
        "strategy": "merge_orthogonal",
        "strategy_options": {"merge": "svd", "orthogonal": "released"},
        "rank": 2,
        "adapter_learning_rate": 0.002,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("target_modules=[conv_in, conv_out]", ["conv_in", "conv_out"]),
        ("target_modules=decoder", "decoder"),
        ("train_omega=false", False),
        ("adapter_learning_rate=1.5e3", 1500.0),
        ("adapter_learning_rate=2E-03", 0.002),
        ("max_train_steps=null", None),
        ("max_train_steps=7", 7),
        ("target_modules='1e3'", "1e3"),
    ],
)
def test_values_are_yaml_with_all_ways_to_write_a_float(text, value):
    (choice,) = parse_choices([f"funlora:{text},function=power"])
    assert choice.arguments == {text.partition("=")[0]: value, "function": "power"}


def test_labels_name_the_options_or_are_given():
    labels = [
        choice.label
        for choice in parse_choices(
            ["magmax:compared=cumulative,scaling=0.5", "magmax:label=the, one & only", "magmax:rank=2,label=2"]
        )
    ]
    assert labels == ["magmax (compared=cumulative, scaling=0.5)", "the, one & only", "2"]


def test_outside_data_is_marked_and_brings_its_own_u_net():
    plain, labelled = parse_choices(["diffclass:pretrained=there", "diffclass:pretrained=there,rank=4,label=Stable"])
    assert plain.label == "diffclass (pretrained=there) (outside data)"
    assert labelled.label == "Stable (outside data)"
    assert plain.changes() == {
        "strategy": "diffclass",
        "strategy_options": {"pretrained": "there"},
        "unet_config": None,
    }


def test_keys_are_safe_names_of_folders_and_differ():
    entries = [
        "funlora:target_modules=a/b",
        "funlora:target_modules=a-b",
        "funlora:target_modules=[a/b]",
        "funlora:target_modules=../../c",
        "funlora:target_modules=" + "x" * 300,
        "funlora:target_modules=" + "x" * 299,
        "funlora:rank=1",
        "funlora",
    ]
    keys = [choice.key for choice in parse_choices(entries)]
    assert len({key.lower() for key in keys}) == len(entries)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", key) for key in keys)


def test_the_order_of_options_does_not_make_another_run():
    first, second = (parse_choices([f"magmax:{text}"])[0] for text in ("rank=2,scaling=1", "scaling=1,rank=2"))
    assert first.key == second.key


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], r"`strategies` is \[\], expected a list of at least one"),
        ("funlora", "`strategies` is 'funlora', expected a list"),
        (["funlroa"], "`strategy` is 'funlroa', expected one of: 'funlora'"),
        ([""], "`strategy` is '', expected one of"),
        (
            ["magmax:scalnig=1"],
            r"with 'scalnig', expected 'label', an option of 'magmax' \(targets, compared, scaling\) or",
        ),
        (
            ["funlora:merge=svd"],
            r"an option of 'funlora' \(it has none\) or an argument of its run \(.*adapter_learning_rate",
        ),
        (["funlora:seed=3"], "with 'seed', expected"),
        (["funlora:output_dir=x"], "with 'output_dir', expected"),
        (["funlora:classes_per_task=3"], "with 'classes_per_task', expected"),
        (["funlora:rank"], r"with 'rank', expected 'name:key=value,key=value'"),
        (["funlora:rank="], r"expected 'name:key=value,key=value'"),
        (["funlora:rank=1,rank=2"], "with 'rank' twice, expected it once"),
        (["funlora:target_modules=[a"], r"where 'target_modules' is not valid YAML: '\[a'"),
        (
            ["magmax:scaling=much"],
            "'magmax:scaling=much', which is not possible: `scaling` is 'much', expected a number",
        ),
        (["magmax:scaling=-1"], "'magmax:scaling=-1', which is not possible: `scaling` is -1"),
        (["funlora", "joint", "funlora"], "'funlora', 'funlora', which are the same run"),
        (["funlora:rank=2", "funlora:label=x,rank=2"], "are the same run: name it once"),
        (["funlora:label=a", "joint:label=a"], "'funlora:label=a', 'joint:label=a', which have one label"),
    ],
)
def test_what_is_wrong_is_named(entries, words):
    with pytest.raises(ValueError, match=words):
        parse_choices(entries)
