"""The example as users start it: command line, recipes, several processes, kills in the middle."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from runs import REPOSITORY, TINY_UNET, command_line, digests
from safetensors.torch import load_file

from funlora_hf.files import read_json


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
WITHOUT_DROPOUT = {**TINY_UNET, "dropout": 0.0}
CIFAR10 = Path(os.environ.get("FUNLORA_TEST_DATA", REPOSITORY.parent / "shared" / "data" / "cifar10"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run from the command line, on one process and one thread."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    example = str(REPOSITORY / "examples" / "continual_train.py")
    subprocess.run([sys.executable, example, *command_line()], cwd=folder, env=environment, check=True)
    return folder / "out"


def test_two_processes_give_the_adapters_of_one(uninterrupted, tmp_path, run_example):
    """Byte for byte, on a shared base; and there really were two, each with phases of its own."""
    shutil.copytree(uninterrupted / "base", tmp_path / "mine")
    arguments = command_line(base_model="mine")
    run_example(*arguments, "--output_dir", "one", cwd=tmp_path)
    run_example(*arguments, "--output_dir", "two", cwd=tmp_path, launcher=TORCHRUN)
    results = {name: read_json(tmp_path / name / "results.json") for name in ("one", "two")}
    assert [results[name]["environment"]["num_processes"] for name in ("one", "two")] == [1, 2]
    phases = [read_json(path) for path in (tmp_path / "two" / "checkpoints" / "seconds").iterdir()]
    assert sorted(phase["process"] for phase in phases) == [0, 0, 0, 1, 1, 1]
    assert digests(tmp_path / "one" / "adapters") == digests(tmp_path / "two" / "adapters")
    assert results["two"]["accuracy_matrix"] == results["one"]["accuracy_matrix"]
    assert results["two"]["zero_forgetting"]["identical"] is True


@pytest.mark.slow
def test_a_base_trained_on_two_processes_agrees(uninterrupted, tmp_path, run_example):
    """Without dropout, whose randomness is of the process; an odd batch splits unevenly."""
    arguments = command_line(unet_config=WITHOUT_DROPOUT, base_batch_size=9, classes_per_task=9)
    weights = {}
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        run_example(*arguments, "--output_dir", name, cwd=tmp_path, launcher=launcher)
        weights[name] = load_file(tmp_path / name / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    for key, value in weights["one"].items():
        torch.testing.assert_close(
            weights["two"][key], value, atol=2e-4, rtol=2e-3, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["finetune", "merge_orthogonal", "replay", "guide"])
def test_a_strategy_of_one_generator_trains_on_two_processes(strategy, tmp_path, run_example):
    """They share every batch, so rounding differs, and no more; without dropout, whose randomness is of the process."""
    options = ["--strategy_options", "num_inference_steps=1", "classifier_train_steps=2"]
    arguments = command_line(strategy=strategy, rank=2, num_tasks=2, image_quality="none", unet_config=WITHOUT_DROPOUT)
    arguments += options if strategy in ("replay", "guide") else []
    weights = {}
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        run_example(*arguments, "--output_dir", name, cwd=tmp_path, launcher=launcher)
        weights[name] = load_file(tmp_path / name / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        assert read_json(tmp_path / name / "results.json")["environment"]["num_processes"] == (2 if launcher else 1)
    if strategy in ("replay", "guide"):
        return  # each process draws its share of the mixture by its own seed
    for key, value in weights["one"].items():
        torch.testing.assert_close(
            weights["two"][key], value, atol=2e-3, rtol=2e-2, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("checkpoints/base/step_6", marks=pytest.mark.slow),
        "checkpoints/class_5/step_3",
        pytest.param("adapters/class_4", marks=pytest.mark.slow),
        pytest.param("checkpoints/class_9/step_6", marks=pytest.mark.slow),
        pytest.param("checkpoints/evaluation/task_2.json", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_with_the_same_adapters(moment, uninterrupted, tmp_path, run_example):
    example = str(REPOSITORY / "examples" / "continual_train.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, example, *command_line()], cwd=tmp_path, env=environment, stderr=log
        )
        wait_for(tmp_path / "out" / moment, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "results.json").exists()
    run_example(*command_line(resume_from_checkpoint="latest"), cwd=tmp_path)
    assert digests(tmp_path / "out" / "adapters") == digests(uninterrupted / "adapters")
    assert digests(tmp_path / "out" / "base") == digests(uninterrupted / "base")
    resumed, expected = (read_json(folder / "results.json") for folder in (tmp_path / "out", uninterrupted))
    for key in ("accuracy_matrix", "LA", "held_out_loss", "zero_forgetting"):
        assert resumed[key] == expected[key], key


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(60_000):
        if path.exists():
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.slow
def test_a_run_whose_time_is_over_says_so_by_its_exit_code(uninterrupted, tmp_path, run_example):
    done = run_example(*command_line(time_limit_minutes=1e-9), cwd=tmp_path, check=False)
    assert done.returncode == 75
    assert "`time_limit_minutes` 1e-09 is over: stopped before phase 'base'." in done.stderr
    assert "Traceback" not in done.stderr
    run_example(*command_line(resume_from_checkpoint="latest"), cwd=tmp_path)
    assert digests(tmp_path / "out" / "adapters") == digests(uninterrupted / "adapters")


# Each process has a clock of its own that only looking at it moves, the second one's faster.
SLOW_AND_FAST = """
import itertools, os, sys
from funlora_hf.continual import time_limit
ticks = itertools.count(step=1 + int(os.environ["RANK"]))
time_limit.monotonic = lambda: float(next(ticks))
sys.path.insert(0, {examples!r})
import continual_train
continual_train.main()
"""


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_to_the_same_end(tmp_path, run_example):
    (tmp_path / "clocked.py").write_text(SLOW_AND_FAST.format(examples=str(REPOSITORY / "examples")))
    (tmp_path / "whole").mkdir()
    run_example(*command_line(), cwd=tmp_path / "whole", launcher=TORCHRUN)
    stops = []
    while len(stops) < 10:
        resume = "latest" if stops else None
        arguments = command_line(time_limit_minutes=22 / 60, resume_from_checkpoint=resume, checkpointing_steps=100)
        done = run_example(*arguments, cwd=tmp_path, launcher=TORCHRUN, script=tmp_path / "clocked.py", check=False)
        if done.returncode == 0:
            break
        found = re.findall(r"0.366667 is over: stopped (.*?)\. What", done.stderr)
        assert len(found) == 2, done.stderr[-4000:]
        stops.append(found)
    # The base is trained by both, which stop at one step though the clocks differ; adapters each by its own process.
    assert any(len(set(pair)) == 1 and "of phase 'base'" in pair[0] for pair in stops), stops
    assert any("of phase 'class_" in " ".join(pair) for pair in stops), stops
    for part in ("base", "adapters"):
        assert digests(tmp_path / "out" / part) == digests(tmp_path / "whole" / "out" / part)


def test_accelerate_launch_starts_it(tmp_path, run_example):
    launcher = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1")
    done = run_example(*command_line(max_train_steps=1), cwd=tmp_path, launcher=launcher)
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


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "examples" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_understood(recipe):
    sys.path.insert(0, str(REPOSITORY / "examples"))
    try:
        from continual_train import parse
    finally:
        sys.path.pop(0)
    arguments = parse(["--config", str(recipe), "--seed", "5"])
    assert arguments.training.seed == 5
    named_by_size = re.fullmatch(r".*-(\d+)", recipe.stem)
    assert arguments.data.classes_per_task == (int(named_by_size[1]) if named_by_size else 2)
    given = yaml.safe_load(recipe.read_text())
    everything = {}
    for part in (arguments.data, arguments.model, arguments.training, arguments.evaluation):
        everything |= vars(part)
    assert {key: everything[key] for key in given} == given


def test_the_fast_recipe_differs_in_how_it_trains_and_judges_alone():
    paper, fast = (
        yaml.safe_load((REPOSITORY / "examples" / "recipes" / f"{name}.yaml").read_text())
        for name in ("cifar10_2-2", "cifar10_fast")
    )
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
        *("--config", str(REPOSITORY / "examples" / "recipes" / "cifar10_fast.yaml"), "--label_column", "label"),
        *("--dataset_name", "images", "--output_dir", "out", "--unet_config", json.dumps(unet)),
        *("--max_train_steps", "2", "--base_batch_size", "4", "--adapter_batch_size", "4", "--torch_compile", "False"),
        *("--num_samples_per_class", "4", "--num_probe_samples", "2", "--num_inference_steps", "2"),
        *("--held_out_sigmas", "1", "--classifier_architecture", "cnn"),
        cwd=tmp_path,
    )
    results = read_json(tmp_path / "out" / "results.json")
    assert results["settings"]["ContinualTrainingArguments"]["channels_last"] is True
    assert results["zero_forgetting"]["identical"] is True


def test_the_digits_recipe_is_the_default():
    sys.path.insert(0, str(REPOSITORY / "examples"))
    try:
        from continual_train import parse
    finally:
        sys.path.pop(0)
    assert parse(["--config", str(REPOSITORY / "examples" / "recipes" / "digits_2-2.yaml")]) == parse([])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--function", "sine"], "error: `function` is 'sine', expected one of"),
        (["--config", "recipe.yaml"], "unknown keys learning_rate, stategy"),
        (
            ["--unet_config", '{"sample_size": 8}', "--dataset_name", "a.parquet"],
            "error: dataset_name='a.parquet' looks",
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
        *("--config", str(REPOSITORY / "examples" / "recipes" / "cifar10_2-2.yaml")),
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
