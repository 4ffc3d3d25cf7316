from __future__ import annotations

import json
from functools import partial

import numpy as np
import PIL.Image
import pytest
import steps_report
from runs import digests, short_run
from steps_to_loss import Setting, StepsArguments, run_steps

from funlora_hf.utils.files import read_json


SHORT = {
    "max_images_per_class": 8,
    "classes_per_task": 5,
    "base_train_steps": 2,
    "adapter_train_steps": 2,
    "adapter_warmup_steps": 0,
}
ASKED = (
    *("--settings", "before: adapter_learning_rate=1e-3,timestep_density=uniform", "recipe:"),
    *("--steps", "1", "2", "--seeds", "0", "1", "--num_workers", "2"),
)


@pytest.fixture
def table(run_short_example):
    return partial(run_short_example, "steps_to_loss.py", SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("steps")


@pytest.fixture
def finished(table, folder):
    """The output of a finished table, made once."""
    if not (folder / "out" / "steps_to_loss.md").is_file():
        assert table(folder, *ASKED).stdout.strip() == (folder / "out" / "steps_to_loss.md").read_text().strip()
    return folder / "out"


@pytest.mark.slow
def test_rows_are_those_of_the_runs(finished):
    record = read_json(finished / "steps_to_loss.json")
    assert "--steps 1 2" in record["command"]
    assert "torch" in record["versions"]
    rows = record["rows"]
    assert len(rows) == 8
    runs = {path.parent: read_json(path) for path in finished.glob("seed_*/*/*/results.json")}
    assert len(runs) == 8
    for row in rows:
        # Found by what the run says of itself.
        rate, density = {"before": (1e-3, "uniform"), "recipe": (3e-2, "stratified")}[row["setting"]]
        settings = {
            "seed": row["seed"],
            "adapter_train_steps": row["steps"],
            "adapter_learning_rate": rate,
            "timestep_density": density,
        }
        (run,) = (
            one for one in runs.values() if settings.items() <= one["settings"]["ContinualTrainingArguments"].items()
        )
        losses = [run["held_out_loss"]["per_class"][str(class_id)] for class_id in range(5, 10)]
        assert row["loss"] == pytest.approx(np.mean(losses))
        assert list(row["loss_per_class"].values()) == losses
        assert 0 < row["seconds"] <= run["seconds"]["total"]


@pytest.mark.slow
def test_all_runs_of_a_seed_share_one_base(finished):
    sources = {
        (path.parts[-6], json.loads(path.read_text())["base_model_name_or_path"])
        for path in finished.glob("seed_*/*/*/adapters/class_5/adapter_config.json")
    }
    assert len(sources) == 2
    assert len([*finished.glob("bases/seed_*")]) == 2


@pytest.mark.slow
def test_figures(finished):
    assert PIL.Image.open(finished / "figures" / "steps_to_loss.png").size[0] > 300
    assert PIL.Image.open(finished / "figures" / "samples_by_steps.png").size[0] > 5 * 4 * 32


@pytest.mark.slow
def test_started_again_it_runs_nothing(table, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("results.json")}
    tables = {name: digest for name, digest in digests(finished).items() if name.endswith(".md")}
    table(finished.parent, *ASKED)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("results.json")} == before
    assert {name: digest for name, digest in digests(finished).items() if name.endswith(".md")} == tables


def test_bad_arguments_end_in_one_line_before_anything_is_written(table, tmp_path):
    done = table(tmp_path, "--settings", "slow: adapter_learning_rat=1e-3", check=False)
    assert done.returncode == 1
    line = "error: `settings` has 'slow: adapter_learning_rat=1e-3' with 'adapter_learning_rat', expected an argument"
    assert done.stderr.splitlines()[-1].startswith(line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": [50, 25]}, r"`steps` is \[50, 25\], expected increasing numbers above 0: sort them"),
        ({"steps": [25, 25]}, r"`steps` is \[25, 25\], expected increasing"),
        ({"steps": [0, 1]}, r"`steps` is \[0, 1\], expected increasing"),
        ({"seeds": [1, 1]}, r"`seeds` is \[1, 1\], expected different numbers"),
        ({"settings": []}, r"`settings` is \[\], expected at least one"),
        ({"settings": [":adapter_start=mean"]}, "`settings` has ':adapter_start=mean' without a label"),
        ({"settings": ["a: fast"]}, "`settings` has 'a: fast' with ' fast', expected 'name:key=value"),
        (
            {"settings": ["a: base_train_steps=3"]},
            "'base_train_steps', expected an argument .* or give it to all runs",
        ),
        ({"settings": ["a: adapter_train_steps=3"]}, "with 'adapter_train_steps', expected an argument"),
        ({"settings": ["a: seed=3"]}, "with 'seed', expected an argument"),
        ({"settings": ["a:", "a: function=power"]}, r"`settings` has 'a:', 'a: function=power', .* \(label 'a'\)"),
        ({"settings": ["a:", "b:"]}, r"`settings` has 'a:', 'b:', which are not told apart"),
        ({"settings": ["a: function=[1"]}, r"`settings` has .*, where 'function' is not valid YAML"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        StepsArguments(**arguments)


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        (
            {},
            ["a: adapter_learning_rate=-1"],
            "`settings` has 'a', whose run is not possible: `adapter_learning_rate`",
        ),
        ({"adapter_train_steps": 7}, ["a:"], r"`steps` is \[1, 2\], and the recipe's `adapter_train_steps` is 7"),
        ({"strategy": "joint"}, ["a:"], "`strategy` is 'joint', expected one that trains `adapter_train_steps`"),
        ({"class_order_seed": 1}, ["a:"], "`class_order` or `class_order_seed` is given, expected neither"),
    ],
)
def test_runs_that_are_not_possible_are_refused_before_anything_runs(tmp_path, recipe, settings, words):
    reference = short_run(**{"output_dir": str(tmp_path / "out"), "adapter_train_steps": 2, **recipe})
    with pytest.raises(ValueError, match=words):
        run_steps(StepsArguments(settings=settings, steps=[1, 2], seeds=[0]), reference)
    assert not (tmp_path / "out").exists()


def test_settings_are_read_as_in_a_recipe():
    setting = Setting.parse("fast: adapter_learning_rate=3e-2, target_modules=[all],train_omega=false")
    assert setting.label == "fast"
    assert setting.changes == {"adapter_learning_rate": 0.03, "target_modules": ["all"], "train_omega": False}


STEPS, SEEDS = [10, 20, 40, 80], [3, 4, 5]


def numbers():
    """Losses (setting, steps, seed), falling for "before" and faster for "recipe", with noise that puts some out of order."""
    noise = np.random.default_rng(0).normal(0, 0.02, (2, len(STEPS), len(SEEDS)))
    return noise + 1 / np.log(STEPS)[None, :, None] + np.array([0, -0.06])[:, None, None]


def of_array(values):
    return {
        label: {n: [None if np.isnan(v) else float(v) for v in values[i, j]] for j, n in enumerate(STEPS)}
        for i, label in enumerate(["before", "recipe"])
    }


def test_the_table_is_that_of_numpy():
    values = numbers()
    reached = steps_report.steps_to_reach(of_array(values), 40, SEEDS)
    lines = steps_report.as_markdown(of_array(values), reached, 40).splitlines()
    means, deviations = values.mean(axis=2), values.std(axis=2, ddof=1)
    for row, number in enumerate(STEPS):
        cells = [f"{means[i, row]:.4f} ± {deviations[i, row]:.4f}" for i in range(2)]
        assert f"| {number} | {cells[0]} | {cells[1]} |" in lines
    curves = [("mean", means), *((f"seed {seed}", values[:, :, place]) for place, seed in enumerate(SEEDS))]
    for name, of_settings in curves:
        target = of_settings[0, 2]
        expected = [STEPS[int(np.argmax(curve <= target))] for curve in of_settings]
        assert reached[name]["loss"] == pytest.approx(target)
        assert list(reached[name]["steps"].values()) == expected
    assert lines[-1] == "| recipe | " + " | ".join(str(one["steps"]["recipe"]) for one in reached.values()) + " |"


def test_a_loss_that_is_not_reached_and_a_run_that_failed_are_no_numbers():
    values = numbers()
    values[1] += 9
    values[0, 1, 0] = np.nan
    reached = steps_report.steps_to_reach(of_array(values), 20, SEEDS)
    assert reached["mean"] == {"loss": None, "steps": {"before": None, "recipe": None}}
    assert reached["seed 3"]["loss"] is None
    assert reached["seed 4"]["steps"]["before"] <= 20
    assert reached["seed 4"]["steps"]["recipe"] is None
    text = steps_report.as_markdown(of_array(values), reached, 20)
    assert "| 20 | - | " in text
    assert "| setting | mean (-) | seed 3 (-) | seed 4 (" in text
