"""Whatever bytes a recipe has, they are a run's arguments, or refused with the file's name: no hang, memory within the cap."""

from __future__ import annotations

import json

import pytest
import yaml
from hostile import ABSURD, JSON, bounded, examples, guarded
from hypothesis import given
from hypothesis import strategies as st

from ablation.runner import AblationArguments
from comparison.runner import ComparisonArguments
from funlora_hf import train
from funlora_hf.continual.config import ARGUMENTS
from funlora_hf.recipes.reading import MOST_BYTES, find_recipe, load_yaml, read_recipe, recipe_names
from funlora_hf.run import RunArguments


KEYS = sorted(
    {name for part in (*ARGUMENTS, AblationArguments, ComparisonArguments) for name in part.__dataclass_fields__}
)
VALUES = JSON | st.sampled_from(
    [*ABSURD, float("nan"), float("inf"), "\ud800", "a\0b", [], {}, [[]], "../..", b"\xff", "x" * 10**4]
)
FORMS = [(), (ComparisonArguments,), (AblationArguments,)]
TIMES = pytest.mark.parametrize("times", [1, pytest.param(40, marks=pytest.mark.soak, id="forty-times-as-many")])


@pytest.fixture(scope="module")
def parse():
    with guarded():
        yield train.parse


def attempt(parse, file, capsys, more=()) -> str | None:
    """The message that a recipe is refused with; None if it is taken."""
    code = None
    try:
        with bounded():
            parsed = parse(["--config", str(file)], *more)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
    except SystemExit as end:
        code = end.code
        text = capsys.readouterr().err.rpartition("error: ")[2]
    else:
        assert isinstance(parsed[0] if more else parsed, RunArguments)
        return None
    assert code in (None, 2)
    assert str(file) in text
    assert len(text) < 20_000
    return text


def dump(values) -> str:
    """Also of what safe_dump does not write: half a surrogate pair."""
    try:
        return yaml.safe_dump(values, allow_unicode=False)
    except (yaml.YAMLError, ValueError):
        return json.dumps(values, default=repr)


@TIMES
def test_any_values_of_any_keys(times, parse, tmp_path, capsys):
    """Each is a value of its kind, or is named."""
    taken = refused = 0
    file = tmp_path / "recipe.yaml"

    @examples(250 * times)
    @given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2), st.sampled_from(FORMS))
    def check(values, more):
        nonlocal taken, refused
        file.write_text(dump(values))
        text = attempt(parse, file, capsys, more)
        taken, refused = taken + (text is None), refused + (text is not None)
        # Of `strategies` each is refused as a `strategy`.
        named = [
            key for key in (*values, *("strategy" for key in values if key == "strategies")) if key in (text or "")
        ]
        assert text is None or named or "mapping" in text or "not a recipe" in text, text

    check()
    assert taken > 5
    assert refused > 50


@TIMES
def test_any_unet(times, parse, tmp_path, capsys):
    sound = RunArguments(*(part() for part in ARGUMENTS)).model.unet_config
    file = tmp_path / "recipe.yaml"

    @examples(100 * times)
    @given(st.sampled_from([*sound, "norm_num_groups", "x"]), VALUES, st.booleans())
    def check(key, value, as_text):
        config = {**sound, key: value}
        file.write_text(dump({"unet_config": json.dumps(config, default=repr) if as_text else config}))
        text = attempt(parse, file, capsys)
        assert text is None or "unet_config" in text or "not a recipe" in text, text

    check()


@TIMES
def test_any_bytes(times, parse, tmp_path, capsys):
    sound = find_recipe("cifar10_2-2").read_bytes()
    file = tmp_path / "recipe.yaml"

    @examples(150 * times)
    @given(
        st.one_of(
            st.binary(max_size=64),
            st.text(alphabet="&*!<>|{}[]:-?,#%@`\"'\\ \n\tabc01", max_size=60).map(str.encode),
            st.tuples(st.integers(0, len(sound)), st.binary(min_size=1, max_size=4)).map(
                lambda pair: sound[: pair[0]] + pair[1] + sound[pair[0] + len(pair[1]) :]
            ),
        )
    )
    def check(content):
        file.write_bytes(content)
        attempt(parse, file, capsys)

    check()


LAUGHS = "a: &a [1,2]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "billion laughs": (LAUGHS, "alias"),
    "anchor of itself": ("seed: &a [*a]", "alias"),
    "merge": ("a: &a {seed: 1}\n<<: *a", "alias"),
    "deep": ("seed: " + "[" * 30_000, "nested too deep"),
    "deep mapping": ("{a: " * 15_000, "nested too deep"),
    "long": ("#" * (MOST_BYTES + 1), "expected 65536 at most"),
    "python": ("seed: !!python/object/apply:os.system ['touch evil']", "could not determine a constructor"),
    "python name": ("seed: !!python/name:os.system", "could not determine a constructor"),
    "list": ("- 1", "a list, expected a mapping"),
    "text": ("seed", "text, expected a mapping"),
    "number": ("1", "a int, expected a mapping"),
    "twice": ("seed: 1\nseed: 2", "'seed' twice"),
    "twice in a U-Net": ("unet_config: {sample_size: 8, sample_size: 16}", "'sample_size' twice"),
    "two documents": ("seed: 1\n---\nseed: 2", "single document"),
    "no date": ("seed: 2001-99-99", "not a recipe"),
    "huge number": ("seed: " + "1" * 10_000, "not a recipe"),
    "tag of nothing": ("seed: !!int ''", "not a recipe"),
    "number as key": ("1: 2", "unknown keys '1'"),
    "mapping as key": ("{a: 1}: 2", "not a recipe"),
    "unknown key": ("sead: 2", "unknown keys 'sead'"),
    "not UTF-8": (b"seed: \xff\xfe\xfd", "not a recipe"),
    "words": ("base_train_steps: many", "base_train_steps"),
    "list for a number": ("base_train_steps: [1]", "`base_train_steps` is [1], expected a whole number or None"),
    "fraction": ("base_train_steps: 1.5", "`base_train_steps` is 1.5, expected a whole number or None"),
    "truth for a number": ("seed: true", "`seed` is True, expected a whole number"),
    "number for a truth": ("deterministic: 3", "`deterministic` is 3, expected true or false"),
    "no number": ("base_learning_rate: .nan", "`base_learning_rate` is nan, expected a number"),
    "infinite": ("max_grad_norm: .inf", "`max_grad_norm` is inf, expected a number or None"),
    "64 bits": ("seed: 9223372036854775808", "`seed` is 9223372036854775808, expected a whole number"),
    "number for text": ("output_dir: 3", "`output_dir` is 3, expected text"),
    "options": ("strategy_options: 3", "`strategy_options` is 3, expected key=value, or in a recipe a mapping"),
    "channels": (
        "unet_config: {sample_size: 8, block_out_channels: [1000000000]}",
        "`unet_config.block_out_channels` has 1000000000",
    ),
    "layers": (
        "unet_config: {sample_size: 8, layers_per_block: 1000000}",
        "`unet_config.layers_per_block` has 1000000",
    ),
    "pixels": (
        "unet_config: {sample_size: 1000000}",
        "`unet_config.sample_size` has 1000000, expected numbers of 4096 at most",
    ),
    "blocks": ("unet_config: {sample_size: 8, block_out_channels: [" + "8," * 1000 + "8]}", "has 1001 entries"),
    "text as U-Net": ("unet_config: '{'", "`unet_config` is '{', expected a JSON mapping"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_recipes_that_are_refused(name, parse, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, expected = REFUSED[name]
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in " ".join(attempt(parse, file, capsys).split())
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_is_no_file(parse, tmp_path, capsys):
    assert "Is a directory" in attempt(parse, tmp_path, capsys)
    assert "no such file" in attempt(parse, tmp_path / "gone", capsys)


def test_a_recipe_is_found_by_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = find_recipe("cifar10_2-2")
    assert own.is_file()
    (tmp_path / "cifar10_2-2").mkdir()
    assert find_recipe("cifar10_2-2") == own
    (tmp_path / "cifar10_2-2").rmdir()
    (tmp_path / "cifar10_2-2").write_text("seed: 7\n")
    assert read_recipe("cifar10_2-2", known=["seed"]) == {"seed": 7}
    assert train.parse(["--config", "digits_2-2"]) == train.parse([])


@pytest.mark.parametrize("given", ["cifar10_2-3", "examples/recipes/cifar10_2-2.yaml", "cifar10_2-2.yaml"])
def test_an_unknown_name_lists_the_names_and_the_nearest(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'cifar10_2-2'\? .* one of the recipes") as caught:
        find_recipe(given)
    assert all(name in str(caught.value) for name in recipe_names())


def test_values_come_as_they_were_written(parse, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "base_learning_rate: 2e-3\nmax_grad_norm: 1\nbase_train_steps: '7'\ntarget_modules: all\nseed: 0x10\n"
    )
    training = parse(["--config", str(file), "--seed", "3"]).training
    assert (training.base_learning_rate, training.max_grad_norm, training.base_train_steps) == (2e-3, 1, 7)
    assert training.seed == 3
    assert load_yaml("a: [1, {b: null}]") == {"a": [1, {"b": None}]}
    file.write_text("")
    assert read_recipe(file, known=[]) == {}
