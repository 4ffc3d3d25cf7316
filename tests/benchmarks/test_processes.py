"""One process of the benchmark does what it is timed for; processes that share unevenly are refused."""

import subprocess

import pytest

from funlora_hf.adapters.class_folder import adapter_folders
from funlora_hf.continual.base import save_base
from funlora_hf.utils.files import folder_sha256, read_json, write_json


@pytest.fixture
def processes(benchmark, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    return benchmark("processes")


@pytest.fixture
def base(tmp_path, small_unet):
    folder = tmp_path / "base"
    save_base(small_unet(), folder, range(10), {number: str(number) for number in range(10)})
    return folder


def test_a_process_learns_all_classes_and_the_warm_up_changes_nothing(processes, base, tmp_path, monkeypatch):
    processes.work(base, tmp_path / "warm")
    assert read_json(tmp_path / "warm" / processes.SECONDS) > 0
    assert [path.name for path in adapter_folders(tmp_path / "warm" / "adapters")] == [
        f"class_{number}" for number in range(10, 10 + processes.CLASSES)
    ]
    monkeypatch.setattr(processes, "warm_up", lambda *arguments: None)
    processes.work(base, tmp_path / "cold")
    digests = {folder_sha256(tmp_path / name / "adapters") for name in ("warm", "cold")}
    assert len(digests) == 1
    # Four different adapters: the classes have images of their own.
    weights = {
        path.joinpath("adapter_model.safetensors").read_bytes() for path in (tmp_path / "cold" / "adapters").iterdir()
    }
    assert len(weights) == processes.CLASSES


@pytest.mark.parametrize(("trained_by", "accepted"), [((0, 1, 0, 1), True), ((0, 0, 0, 0), False)])
def test_two_processes_must_share_the_classes(processes, tmp_path, monkeypatch, trained_by, accepted):
    def run(command, **settings):
        for number, process in enumerate(trained_by):
            write_json(tmp_path / "checkpoints" / "seconds" / f"class_{number}.json", {"process": process})
        write_json(tmp_path / processes.SECONDS, 2.5)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(processes.subprocess, "run", run)
    if accepted:
        assert processes.launch(tmp_path, tmp_path, 2) == 2.5
    else:
        with pytest.raises(RuntimeError, match="not shared evenly"):
            processes.launch(tmp_path, tmp_path, 2)


def test_a_failed_run_shows_its_errors(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(
        processes.subprocess, "run", lambda command, **settings: subprocess.CompletedProcess(command, 3, "", "boom")
    )
    with pytest.raises(RuntimeError, match="ended with 3:\nboom"):
        processes.launch(tmp_path, tmp_path, 2)


def test_rounds_alternate_and_unequal_files_show(processes, small_unet, monkeypatch):
    launched = []

    def launch(base, output, count):
        launched.append(count)
        write_json(output / "adapters" / "class_0.json", {"round": len(launched) // 6})
        return {1: 8.0, 2: 4.0}[count]

    monkeypatch.setattr(processes, "launch", launch)
    monkeypatch.setattr(processes, "paper_unet", small_unet)
    findings = processes.measure(rounds=3)
    assert launched == [2, 1, 1, 2, 2, 1]
    assert findings.rows[0].ratio == 2.0
    assert findings.rows[0].seconds == {"1 process": 8.0 / processes.CLASSES, "2 processes": 4.0 / processes.CLASSES}
    assert findings.facts == {"adapters of all runs equal to the byte": False}
