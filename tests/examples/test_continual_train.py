"""The example as users start it: command line, recipes, several processes, kills in the middle."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from runs import REPOSITORY, command_line, digests

from funlora_hf.utils.files import read_json


CIFAR10 = Path(os.environ.get("FUNLORA_TEST_DATA", REPOSITORY.parent / "shared" / "data" / "cifar10"))


@pytest.mark.slow
def test_a_run_whose_time_is_over_says_so_by_its_exit_code(uninterrupted, tmp_path, run_example):
    done = run_example(*command_line(time_limit_minutes=1e-9), cwd=tmp_path, check=False)
    assert done.returncode == 75
    assert "`time_limit_minutes` 1e-09 is over: stopped before phase 'base'." in done.stderr
    assert "Traceback" not in done.stderr
    run_example(*command_line(resume_from_checkpoint="latest"), cwd=tmp_path)
    assert digests(tmp_path / "out" / "adapters") == digests(uninterrupted.folder / "adapters")


def test_accelerate_launch_starts_it(tmp_path, run_example):
    launcher = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1")
    module = Path("funlora_hf.train")
    done = run_example(*command_line(max_train_steps=1), cwd=tmp_path, launcher=(*launcher, "-m"), script=module)
    assert "zero forgetting   first samples of 10 classes equal to the bit, base unchanged" in done.stdout


def test_the_command_line_wins_over_the_recipe(tmp_path, run_example):
    recipe = {
        "dataset_name": "digits",
        "classes_per_task": 5,
        "base_train_steps": 2,
        "unet_config": {"sample_size": 8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = command_line(max_train_steps=1)
    position = arguments.index("--classes_per_task")
    del arguments[position : position + 2]
    run_example("--config", "recipe.yaml", *arguments, cwd=tmp_path)
    settings = read_json(tmp_path / "out" / "results.json")["settings"]
    assert settings["DataArguments"]["classes_per_task"] == 5
    assert settings["ContinualTrainingArguments"]["base_train_steps"] == 12


@pytest.mark.slow
def test_the_fast_recipe_runs_on_images_of_a_folder(tmp_path, run_example):
    """Cut short, with a small model, not compiled; in bfloat16 and channels_last, as it says."""
    generator = np.random.default_rng(0)
    for name in "abcd":
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(5):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    unet = {
        "sample_size": 32,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    }
    run_example(
        *("--config", "cifar10_fast", "--label_column", "label"),
        *("--dataset_name", "images", "--output_dir", "out", "--unet_config", json.dumps(unet)),
        *("--max_train_steps", "2", "--base_batch_size", "4", "--adapter_batch_size", "4", "--torch_compile", "False"),
        *("--num_samples_per_class", "4", "--num_probe_samples", "2", "--num_inference_steps", "2"),
        *("--held_out_sigmas", "1", "--classifier_architecture", "cnn"),
        cwd=tmp_path,
    )
    results = read_json(tmp_path / "out" / "results.json")
    assert results["settings"]["ContinualTrainingArguments"]["channels_last"] is True
    assert results["zero_forgetting"]["identical"] is True


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--function", "sine"], "error: `function` is 'sine', expected one of"),
        pytest.param(["--config", "recipe.yaml"], "unknown keys 'learning_rate', 'stategy'", marks=pytest.mark.slow),
        pytest.param(
            ["--unet_config", '{"sample_size": 8}', "--dataset_name", "a.parquet"],
            "error: dataset_name='a.parquet' looks",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_ends_with_one_line(arguments, text, tmp_path, run_example):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1\nstategy: joint\n")
    done = run_example(*arguments, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (CIFAR10 / "train.parquet").is_file(), reason=f"no CIFAR-10 parquet files in {CIFAR10.name}/")
def test_real_cifar10_runs_through_its_recipe(tmp_path, run_example):
    """A smaller model and few steps; the recipe's split, flips, sampler and ResNet-18."""
    unet = {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    run_example(
        *("--config", "cifar10_2-2"),
        *("--dataset_name", str(CIFAR10), "--output_dir", "out", "--unet_config", json.dumps(unet)),
        *("--max_train_steps", "2", "--base_batch_size", "16", "--adapter_batch_size", "16"),
        *("--num_samples_per_class", "6", "--num_probe_samples", "2", "--solver_tolerance", "0.1"),
        *("--held_out_sigmas", "1", "--max_images_per_class", "40"),
        cwd=tmp_path,
        timeout=900,
    )
    results = read_json(tmp_path / "out" / "results.json")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert list(results["class_names"].values()) == names
    assert len(results["A"]) == 5
    assert results["zero_forgetting"]["identical"] is True
    assert len(list((tmp_path / "out" / "adapters").iterdir())) == 8
