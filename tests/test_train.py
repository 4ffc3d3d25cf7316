"""The command line of a run: arguments, recipes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from funlora_hf.continual.config import ARGUMENTS
from funlora_hf.recipes.reading import find_recipe, recipe_names
from funlora_hf.train import parse


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_are_understood(recipe, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()  # the default of own_images
    monkeypatch.chdir(tmp_path)
    arguments = parse(["--config", recipe, "--seed", "5"])
    assert arguments.training.seed == 5
    named_by_size = re.fullmatch(r".*-(\d+)", recipe)
    assert arguments.data.classes_per_task == (int(named_by_size[1]) if named_by_size else 2)
    given = yaml.safe_load(find_recipe(recipe).read_text())
    everything = {}
    for part in (arguments.data, arguments.model, arguments.training, arguments.evaluation):
        everything |= vars(part)
    assert {key: everything[key] for key in given} == given


def test_a_recipe_for_a_folder_asks_for_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^the recipe own_images needs --dataset_name FOLDER"):
        parse(["--config", "own_images"])
    assert parse(["--config", "own_images", "--dataset_name", "mnist"]).data.dataset_name == "mnist"


def test_messages_of_libraries_are_logged_once():
    """In a process of its own: pytest has handlers, too."""
    code = (
        "import logging, datasets, huggingface_hub\nfrom funlora_hf.train import set_up_logging\nset_up_logging()\n"
        "for name in ('huggingface_hub.utils._http', 'datasets.load'):\n    logging.getLogger(name).warning('here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "WARNING huggingface_hub.utils._http: here\nWARNING datasets.load: here\n"


def test_the_fast_recipe_differs_in_how_it_trains_and_judges_alone():
    paper, fast = (yaml.safe_load(find_recipe(name).read_text()) for name in ("cifar10_2-2", "cifar10_fast"))
    for key in (
        "unet_config",
        "dataset_name",
        "classes_per_task",
        "random_flip",
        "classifier_epochs",
        "num_samples_per_class",
    ):
        assert fast[key] == paper[key], key
    assert fast["time_limit_minutes"] <= 8


def test_the_order_of_classes_is_given_by_text_or_numbers(tmp_path):
    (tmp_path / "recipe.yaml").write_text("class_order: [3, cat]\n")
    assert parse(["--config", str(tmp_path / "recipe.yaml")]).data.class_order == ["3", "cat"]
    assert parse(["--class_order", "3", "cat"]).data.class_order == ["3", "cat"]
    with pytest.raises(ValueError, match="`class_order` and `class_order_seed` 1 are both given"):
        parse(["--class_order", "3", "cat", "--class_order_seed", "1"])


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--bas_train_steps=3", ". Did you mean '--base_train_steps'?"),
        ("--sead=3", ". Did you mean '--seed'?"),
        (
            "--steps=3",
            ". Did you mean '--max_train_steps' or '--base_train_steps' or '--base_warmup_steps' or '--num_inference_steps'?",
        ),
        ("--confg=digits_2-2", ". Did you mean '--config'?"),
        ("--max_train=3", ". Did you mean '--max_train_steps'?"),
        ("--xyzzy=3", ""),
    ],
)
def test_an_unknown_option_ends_with_2_and_the_nearest(given, hint, capsys):
    with pytest.raises(SystemExit) as end:
        parse([given, "--function", "cosine"])
    assert end.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.endswith("[--OPTION VALUE ...]")
    assert error.partition("error: ")[2] == f"unrecognized arguments: {given}{hint}"


def test_help_has_a_group_for_each_part_and_says_what_no_options_do(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse(["--help"])
    groups = re.split(r"^(\w[\w ]*):$", capsys.readouterr().out, flags=re.MULTILINE)
    texts = dict(zip(groups[1::2], groups[2::2], strict=True))
    for part, title in zip(ARGUMENTS, ("data", "base and adapters", "training", "evaluation"), strict=True):
        assert set(part.__dataclass_fields__) == set(re.findall(r"^  --(?!no_)(\w+)", texts[title], re.MULTILINE))
    assert "--no_deterministic Switch off --deterministic. --" in " ".join(texts["training"].split())
