"""Several processes on one run: what comes out is what one gives, and none waits for another that is gone."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from runs import TINY_UNET, command_line, digests
from safetensors.torch import load_file
from started_runs import assert_same_run, finish, log_of, operations, short, started, torchrun, wait_for
from strategies import RANKS

from funlora_hf.utils.files import read_json


WITHOUT_DROPOUT = {**TINY_UNET, "dropout": 0.0}
LONG = [pytest.mark.slow, pytest.mark.soak]


def long(test):
    """Left out of `make test`; part of `make soak`."""
    return pytest.mark.slow(pytest.mark.soak(test))


@pytest.fixture(scope="module")
def one(uninterrupted, tmp_path_factory) -> Path:
    """A run of one process on a base that is there already."""
    place = tmp_path_factory.mktemp("one")
    shutil.copytree(uninterrupted.folder / "base", place / "mine")
    finish(place, short(base_model="mine"))
    return place / "out"


def beside(one: Path, place: Path) -> list[str]:
    """The arguments of the same run elsewhere."""
    shutil.copytree(one.parent / "mine", place / "mine")
    return short(base_model="mine")


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=LONG)])
def test_processes_give_the_adapters_of_one(processes, one, tmp_path):
    """Byte for byte, on a shared base; there really were so many, each with phases of its own, and each file is one's work."""
    finish(tmp_path, beside(one, tmp_path), launcher=torchrun(processes))
    results = read_json(tmp_path / "out" / "results.json")
    assert results["environment"]["num_processes"] == processes
    phases = [read_json(path)["process"] for path in (tmp_path / "out" / "checkpoints" / "seconds").iterdir()]
    assert len(phases) == 6
    assert set(phases) == set(range(processes))
    assert digests(tmp_path / "out" / "adapters") == digests(one / "adapters")
    assert results["accuracy_matrix"] == read_json(one / "results.json")["accuracy_matrix"]
    assert results["zero_forgetting"]["identical"] is True
    writers: dict[str, set[int]] = {}
    for rank in range(processes):
        for event, path in operations(tmp_path, rank):
            if event == "os.rename":
                writers.setdefault(path, set()).add(rank)
    kept = [path for path in digests(tmp_path / "out") if not writers.keys() & {path, *map(str, Path(path).parents)}]
    assert kept == []
    assert {path: ranks for path, ranks in writers.items() if len(ranks) > 1} == {}
    assert {rank for ranks in writers.values() for rank in ranks} == set(range(processes))


def processes_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """What a launcher has started for a run."""
    return [
        child
        for child in psutil.Process(launcher.pid).children()
        if any("watched_run.py" in arg for arg in child.cmdline())
    ]


def kill_one(killed: int, arguments: list[str], place: Path, *, processes: int) -> None:
    """Start a run, kill one of its processes in an adapter's training, and see the others end in time, without results."""
    with started(place, arguments, launcher=torchrun(processes)) as launcher:
        wait_for(place / "out" / "checkpoints" / f"class_{4 + killed}" / "step_3", launcher)
        started_ones = processes_of(launcher)
        assert len(started_ones) == processes
        started_ones[killed].kill()
        assert launcher.wait(timeout=120) == 1, log_of(place)
    assert psutil.wait_procs(started_ones, timeout=120)[1] == []
    assert not (place / "out" / "results.json").exists()


@pytest.mark.slow
def test_when_one_of_two_is_killed_the_other_stops(one, tmp_path):
    kill_one(1, beside(one, tmp_path), tmp_path, processes=2)


@long
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_when_one_of_them_is_killed_the_others_stop_and_other_numbers_go_on(killed, one, tmp_path):
    """Three, of which one is killed; two, whose launcher is asked to end; and one, which comes to the end."""
    arguments = beside(one, tmp_path)
    kill_one(killed, arguments, tmp_path, processes=3)

    resumed = [*arguments, "--resume_from_checkpoint", "latest"]
    with started(tmp_path, resumed, launcher=torchrun(2)) as launcher:
        wait_for(tmp_path / "out" / "adapters" / "class_8", launcher)
        processes = processes_of(launcher)
        assert len(processes) == 2
        launcher.terminate()
        assert launcher.wait(timeout=120) != 0, log_of(tmp_path)
    assert psutil.wait_procs(processes, timeout=120)[1] == []
    finish(tmp_path, resumed)
    assert_same_run(tmp_path / "out", one)


@long
def test_a_second_run_in_one_folder_is_refused(tmp_path, run_example):
    """It says who is there; the first one goes on as if nothing had been."""
    endless = short(adapter_train_steps=1_000_000)
    with started(tmp_path, endless) as first:
        wait_for(tmp_path / "out" / "checkpoints" / "class_4" / "step_3", first)
        base = digests(tmp_path / "out" / "base")
        for more in ("--resume_from_checkpoint=latest", "--overwrite_output_dir"):
            done = run_example(*endless, "--output_dir", "out", more, cwd=tmp_path, check=False)
            assert done.returncode == 1
            assert re.search(
                rf"out is in use by process {first.pid} on \S+, for \d\.\d minutes\. Wait for", done.stderr
            )
            assert "Traceback" not in done.stderr
        assert first.poll() is None
        first.terminate()
        assert first.wait(timeout=60) == 143
    assert digests(tmp_path / "out" / "base") == base
    assert len(list((tmp_path / "out" / "checkpoints" / "class_4").glob("step_*"))) == 2


@long
def test_a_base_trained_on_two_processes_agrees(uninterrupted, tmp_path, run_example):
    """Without dropout, whose randomness is of the process; an odd batch splits unevenly."""
    arguments = command_line(unet_config=WITHOUT_DROPOUT, base_batch_size=9, classes_per_task=9)
    weights = {}
    for name, launcher in (("one", ()), ("two", torchrun(2))):
        run_example(*arguments, "--output_dir", name, cwd=tmp_path, launcher=launcher)
        weights[name] = load_file(tmp_path / name / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    for key, value in weights["one"].items():
        torch.testing.assert_close(
            weights["two"][key], value, atol=2e-4, rtol=2e-3, msg=lambda m, key=key: f"{key}: {m}"
        )


@long
@pytest.mark.parametrize("strategy", ["finetune", "ewc", "merge_orthogonal", "replay", "guide", "jdcl", "diffclass"])
def test_a_strategy_of_sequential_trains_on_two_processes(strategy, tmp_path, run_example):
    """They share every batch, so rounding differs, and no more; without dropout, whose randomness is of the process."""
    options = ["--strategy_options", "num_inference_steps=1", "classifier_train_steps=2"]
    arguments = command_line(
        strategy=strategy, **RANKS.get(strategy, {}), num_tasks=2, image_quality="none", unet_config=WITHOUT_DROPOUT
    )
    if strategy == "ewc":
        arguments += ["--strategy_options", "fisher_batches=2"]
    drawing = {"replay": options, "guide": options, "jdcl": options[:2], "diffclass": options}
    arguments += drawing.get(strategy, [])
    file = "adapters/class_5/adapter_model" if strategy == "diffclass" else "model/unet/diffusion_pytorch_model"
    weights = {}
    for name, launcher in (("one", ()), ("two", torchrun(2))):
        run_example(*arguments, "--output_dir", name, cwd=tmp_path, launcher=launcher)
        weights[name] = load_file(tmp_path / name / f"{file}.safetensors")
        assert read_json(tmp_path / name / "results.json")["environment"]["num_processes"] == (2 if launcher else 1)
    if strategy in drawing:
        return  # each process draws its share of the mixture by its own seed
    for key, value in weights["one"].items():
        torch.testing.assert_close(
            weights["two"][key], value, atol=2e-3, rtol=2e-2, msg=lambda m, key=key: f"{key}: {m}"
        )


# Each process has a clock of its own that only looking at it moves, the second one's faster.
SLOW_AND_FAST = """
import gc, itertools, os, sys
from torch.nn.parallel import DistributedDataParallel
from funlora_hf.continual import time_limit
ticks = itertools.count(step=1 + int(os.environ["RANK"]))
time_limit.monotonic = lambda: float(next(ticks))
from funlora_hf import train
try:
    train.main()
finally:
    # Its threads would outlive the group of processes, and gloo may then abort the process at its end.
    if any(isinstance(found, DistributedDataParallel) for found in gc.get_objects()):
        print("A wrapper is left.", file=sys.stderr)
"""


@long
def test_two_processes_stop_together_and_go_on_to_the_same_end(tmp_path, run_example):
    (tmp_path / "clocked.py").write_text(SLOW_AND_FAST)
    (tmp_path / "whole").mkdir()
    run_example(*command_line(), cwd=tmp_path / "whole", launcher=torchrun(2))
    stops = []
    while len(stops) < 10:
        resume = "latest" if stops else None
        arguments = command_line(time_limit_minutes=22 / 60, resume_from_checkpoint=resume, checkpointing_steps=100)
        done = run_example(*arguments, cwd=tmp_path, launcher=torchrun(2), script=tmp_path / "clocked.py", check=False)
        assert "A wrapper is left." not in done.stderr
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


@pytest.mark.slow
def test_ctrl_c_under_torchrun_is_a_checkpoint(one, tmp_path):
    """Its workers have sessions of their own, so that the terminal's signal reaches the launcher, which passes it on."""
    with started(tmp_path, beside(one, tmp_path), launcher=torchrun(2)) as launcher:
        wait_for(tmp_path / "out" / "checkpoints" / "class_4" / "step_3", launcher)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=120) != 0
    check_stopped_by_ctrl_c(tmp_path)
    arguments = short(base_model="mine", resume_from_checkpoint="latest")
    finish(tmp_path, arguments, launcher=torchrun(2))
    assert digests(tmp_path / "out" / "adapters") == digests(one / "adapters")


@pytest.mark.soak
def test_ctrl_c_under_accelerate_is_a_checkpoint(uninterrupted, tmp_path):
    """The terminal's signal reaches the launcher and the run."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    with started(tmp_path, launcher=(*launcher, "--mixed_precision", "no", "--dynamo_backend", "no")) as process:
        wait_for(tmp_path / "out" / "checkpoints" / "base" / "step_3", process)
        (run,) = processes_of(process)
        for each in (process, run):
            each.send_signal(signal.SIGINT)
        run.wait(timeout=60)
        process.wait(timeout=60)
    check_stopped_by_ctrl_c(tmp_path)
    finish(tmp_path)
    assert_same_run(tmp_path / "out", uninterrupted.folder)


def check_stopped_by_ctrl_c(place: Path) -> None:
    log = (place / "log").read_text()
    assert re.search(r"SIGINT: stopped .*--resume_from_checkpoint latest to go on", log), log
    assert list((place / "out" / "checkpoints").glob("*/step_*"))


@pytest.mark.slow
def test_processes_evaluate_as_one_does(one, tmp_path, run_example):
    """Later, by other settings than the run's."""
    arguments = ("evaluate", "out", "--num_samples_per_class", "5")
    for place, launcher in (("one", (sys.executable,)), ("two", torchrun(2))):
        shutil.copytree(one.parent, tmp_path / place, ignore=shutil.ignore_patterns("log", "operations*"))
        run_example(*arguments, cwd=tmp_path / place, launcher=(*launcher, "-m"), script=Path("funlora_hf"))
    alone, together = (read_json(tmp_path / place / "out" / "results.json") for place in ("one", "two"))
    assert together["settings"]["EvaluationArguments"]["num_samples_per_class"] == 5
    for name in ("accuracy_matrix", "class_accuracy", "image_quality", "held_out_loss", "nfe"):
        assert together[name] == alone[name], name
