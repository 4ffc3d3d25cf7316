from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import command_line, digests


ASKED = (
    *("--tables", "operations", "solvers"),
    *("--variants", "add", "euler_2"),
    # Too low and too high at both ends, so that no more are tried.
    *("--learning_rates", "1e-9", "2e-2", "9e2"),
    *("--alpha_rates", "1", "10"),
)
EXAMPLE = Path(__file__).parents[2] / "examples" / "ablation.py"


def ablation(folder, *arguments, **overrides):
    short = {
        "output_dir": str(folder / "out"),
        "max_images_per_class": 8,
        "classes_per_task": 5,
        "base_train_steps": 2,
        "adapter_train_steps": 1,
        "num_samples_per_class": 1,
        **overrides,
    }
    command = [sys.executable, str(EXAMPLE), *command_line(**short), "--seeds", "0", "1", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    done = ablation(folder, *ASKED)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "out"


@pytest.mark.slow
def test_tables_of_every_variant_and_seed(finished):
    rows = list(csv.DictReader((finished / "ablation.csv").open()))
    # The reference is always there.
    assert [row["variant"] for row in rows if row["table"] == "operations"] == ["mul", "add"]
    assert all(row["seeds"] == "2" for row in rows)
    assert {row["variant"]: row["NFE"] for row in rows if row["table"] == "solvers"}["euler, 2 steps"] == "2"
    record = json.loads((finished / "ablation.json").read_text())
    assert record["rows"][0]["variant"] == "mul"
    assert "torch" in record["versions"]
    assert "--tables operations solvers" in record["command"]
    assert (finished / "ablation.md").read_text().count("\n") == len(rows) + 2


@pytest.mark.slow
def test_variants_of_a_seed_share_its_base_and_differ(finished):
    for seed in (0, 1):
        runs = finished / f"seed_{seed}"
        assert not (runs / "add" / "base").exists()
        sources = {
            json.loads((runs / key / "adapters" / "class_5" / "adapter_config.json").read_text())[
                "base_model_name_or_path"
            ]
            for key in ("funlora", "add")
        }
        (base,) = map(Path, sources)
        assert base.is_relative_to(finished / "bases")
        assert base.is_dir()
    first, second = (digests(finished / "seed_0" / key / "adapters") for key in ("funlora", "add"))
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first if name.endswith("safetensors"))


@pytest.mark.slow
def test_solvers_sample_the_adapters_of_the_reference(finished):
    runs = finished / "seed_1"
    assert digests(runs / "euler_2" / "adapters") == digests(runs / "funlora" / "adapters")
    assert json.loads((runs / "euler_2" / "results.json").read_text())["nfe"] == 2


@pytest.mark.slow
def test_the_chosen_rates_are_the_best_and_are_used(finished):
    rates = json.loads((finished / "learning_rates.json").read_text())
    assert set(rates["losses"]) == {f"{key}_alpha_{m}" for key in ("funlora", "add") for m in (1, 10)}
    for key in ("funlora", "add"):
        losses = {m: rates["losses"][f"{key}_alpha_{m}"] for m in (1, 10)}
        of_pairs = {(float(r), m): v for m, of_rates in losses.items() for r, v in of_rates.items() if v is not None}
        best = min(of_pairs, key=of_pairs.__getitem__)
        results = json.loads((finished / "seed_1" / key / "results.json").read_text())
        training = results["settings"]["ContinualTrainingArguments"]
        assert (training["adapter_learning_rate"], training["adapter_alpha_rate"]) == best
        assert tuple(rates["pairs"][key].values()) == best
    # The solver's run has the reference's.
    rows = list(csv.DictReader((finished / "ablation.csv").open()))
    assert len({row["alpha's multiple"] for row in rows if row["variant"] in ("mul", "euler, 2 steps")}) == 1


@pytest.mark.slow
def test_started_again_it_only_runs_what_is_missing(finished):
    lost = finished / "seed_0" / "add"
    before = digests(lost / "adapters")
    others = {p: p.stat().st_mtime_ns for p in finished.rglob("results.json") if lost not in p.parents}
    shutil.rmtree(lost)
    done = ablation(finished.parent, *ASKED)
    assert done.returncode == 0, done.stderr[-4000:]
    assert digests(lost / "adapters") == before
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())


@pytest.mark.slow
def test_a_failed_variant_does_not_lose_the_others(tmp_path):
    (tmp_path / "out" / "seed_0" / "add").mkdir(parents=True)
    # A file where a folder of the run should be.
    (tmp_path / "out" / "seed_0" / "add" / "adapters").write_text("in the way")
    done = ablation(tmp_path, "--tables", "operations", "--variants", "add", "--seeds", "0")
    assert done.returncode != 0
    assert "error: runs of add failed" in done.stderr
    rows = {row["variant"]: row["seeds"] for row in csv.DictReader((tmp_path / "out" / "ablation.csv").open())}
    assert rows == {"mul": "1", "add": "0"}


def test_bad_arguments_end_in_one_line(tmp_path):
    done = ablation(tmp_path, "--tables", "rivlas")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: `tables` has 'rivlas'")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
