"""The command line of a run: arguments, recipes."""

from __future__ import annotations

import re

import pytest
import yaml

from funlora_hf.recipes.reading import find_recipe, recipe_names
from funlora_hf.train import parse


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_are_understood(recipe):
    arguments = parse(["--config", recipe, "--seed", "5"])
    assert arguments.training.seed == 5
    named_by_size = re.fullmatch(r".*-(\d+)", recipe)
    assert arguments.data.classes_per_task == (int(named_by_size[1]) if named_by_size else 2)
    given = yaml.safe_load(find_recipe(recipe).read_text())
    everything = {}
    for part in (arguments.data, arguments.model, arguments.training, arguments.evaluation):
        everything |= vars(part)
    assert {key: everything[key] for key in given} == given


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
