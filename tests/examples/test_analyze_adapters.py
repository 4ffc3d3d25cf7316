"""Ranks and coefficients of adapters on disk, and the files made of them."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from analyze_adapters import analyze_runs, measure_adapter, measure_run, rank_table
from peft import LoraConfig, get_peft_model
from runs import write_adapters
from safetensors.torch import load_file, save_file

from funlora_hf import (
    FunLoraConfig,
    conv_layers,
    functional_matrix,
    initial_alpha,
    layer_importance,
    numerical_rank,
    select_layers,
)
from funlora_hf.evaluation.report import execution_order


@pytest.fixture
def make_run(tiny_pipe, tmp_path):
    """Writes a run of two adapter classes that are no longer at their start."""

    def make(name="run", *, classes=(2, 3), base=True, **config):
        return write_adapters(tiny_pipe, tmp_path / name, classes=classes, base=base, **config)

    return make


def tensors(run, class_id):
    return load_file(run / "adapters" / f"class_{class_id}" / "adapter_model.safetensors")


def test_the_order_is_known_from_the_configuration(make_run, tiny_unet):
    assert execution_order(make_run() / "base") == conv_layers(tiny_unet)


@pytest.mark.parametrize(
    ("config", "alpha", "omega"),
    [
        ({"function": "cosine"}, True, True),
        ({"function": "power", "train_omega": False, "num_functions": 3}, True, False),
        ({"function": "shift", "ratio": 2}, True, False),
        ({"function": "identity", "r": 2}, False, False),
        ({"function": "cosine", "operation": "mul-add"}, True, True),
    ],
)
def test_an_adapter_is_measured_layer_by_layer(make_run, tiny_unet, config, alpha, omega):
    run = make_run(**config)
    found = measure_adapter(run / "adapters" / "class_2")
    saved = tensors(run, 2)
    assert set(found.rank) == set(select_layers(tiny_unet))
    for layer, rank in found.rank.items():
        key = f"base_model.model.{layer}.funlora_"
        parts = [saved.get(key + part) for part in ("A", "B", "alpha", "omega")]
        F = functional_matrix(*parts, function=config["function"]).double().numpy()
        assert rank == np.linalg.matrix_rank(F, tol=None, rtol=max(F.shape) * np.finfo(np.float32).eps)
        if alpha:
            assert found.alpha[layer] == parts[2].tolist()
        if omega:
            assert found.omega[layer] == parts[3].tolist()
    assert bool(found.alpha) == alpha
    assert bool(found.omega) == omega
    assert found.settings.function == config["function"]


def test_ranks_differ_between_functions(make_run):
    ranks = {
        function: measure_run(make_run(function, function=function, num_functions=3))
        for function in ("shift", "identity")
    }
    assert set(ranks["identity"].rank_by_layer().values()) == {(1, 0)}
    assert {mean for mean, _ in ranks["shift"].rank_by_layer().values()} == {3}


def test_a_run_is_measured_over_its_classes(make_run, tiny_unet):
    run = make_run(num_functions=4)
    found = measure_run(run)
    assert found.layers == select_layers(tiny_unet)
    assert list(found.adapters) == ["class_2", "class_3"]
    assert found.held_out_loss == {}
    folders = [run / "adapters" / name for name in found.adapters]
    assert found.importance == layer_importance(folders, order=found.layers)
    for layer, (mean, std) in found.rank_by_layer().items():
        ranks = [adapter.rank[layer] for adapter in found.adapters.values()]
        np.testing.assert_allclose((mean, std), (np.mean(ranks), np.std(ranks)))
    for name in ("alpha", "omega"):
        for layer, values in found.coefficients_by_layer(name).items():
            saved = np.array([tensors(run, c)[f"base_model.model.{layer}.funlora_{name}"].numpy() for c in (2, 3)])
            np.testing.assert_allclose([mean for mean, _ in values], saved.mean(axis=0), rtol=1e-6)
            np.testing.assert_allclose([std for _, std in values], saved.std(axis=0), rtol=1e-5, atol=1e-7)


def test_a_run_on_an_existing_base_takes_the_order_from_its_results(make_run, tiny_unet):
    run = make_run(base=False, target_modules=["conv1", "conv2"])
    order = [name for name in conv_layers(tiny_unet) if name.endswith(("conv1", "conv2"))]
    (run / "results.json").write_text(
        json.dumps(
            {
                "layer_importance": {layer: {"mean": 0.1, "std": 0.0} for layer in order},
                "held_out_loss": {"mean": 0.5, "per_class": {"0": 0.1, "2": 0.4, "3": 0.6}},
            }
        )
    )
    found = measure_run(run)
    assert found.layers == order
    assert found.held_out_loss == {"class_2": 0.4, "class_3": 0.6}
    assert "| 0.5000 |" in rank_table({"cosine": found})


def test_runs_become_files_and_a_table(make_run, tmp_path):
    runs = [
        make_run("a", num_functions=4),
        make_run("b", function="power", num_functions=3, train_omega=False),
        make_run("c", function="identity"),
    ]
    table = analyze_runs(runs, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "coefficients.json",
        "coefficients_cosine.png",
        "coefficients_power.png",
        "importance_cosine.png",
        "importance_identity.png",
        "importance_power.png",
        "rank_by_layer.png",
        "ranks.json",
    ]
    ranks = json.loads((tmp_path / "out" / "ranks.json").read_text())
    assert list(ranks) == ["cosine", "power", "identity"]
    measured = measure_run(runs[0])
    for layer, entry in ranks["cosine"]["layers"].items():
        assert (entry["mean"], entry["std"]) == measured.rank_by_layer()[layer]
        assert entry["per_class"] == {name: adapter.rank[layer] for name, adapter in measured.adapters.items()}
    every = [rank for adapter in measured.adapters.values() for rank in adapter.rank.values()]
    row = next(line for line in table.splitlines() if line.startswith("| cosine |"))
    assert row == (
        f"| cosine | {len(measured.layers)} | 2 | {np.mean(every):.2f} | {np.std(every):.2f} | {min(every)} | {max(every)} "
        "| - |"
    )
    assert "| identity | " in table
    assert "| 1.00 | 0.00 | 1 | 1 | - |" in table
    coefficients = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    layer = measured.layers[0]
    assert coefficients["cosine"]["omega"][layer]["per_class"]["class_3"] == measured.adapters["class_3"].omega[layer]
    assert coefficients["power"]["omega"] == coefficients["identity"]["alpha"] == {}
    assert len(coefficients["power"]["alpha"][layer]["mean"]) == 3


def test_the_figure_of_coefficients_shows_how_far_they_moved(make_run, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "analyze_adapters.coefficients_by_layer",
        lambda panels, path, title: drawn.update({path.name: panels}),
    )
    # An adapter at its start has moved nowhere.
    runs = [make_run("mul", init_weights=True), make_run("add", operation="add", init_weights=True, function="power")]
    analyze_runs(runs, tmp_path / "out")
    cosine, power = drawn["coefficients_cosine.png"], drawn["coefficients_power.png"]
    assert list(cosine) == ["alpha", "change of alpha", "change of omega"]
    for layer, values in cosine["alpha"].items():
        np.testing.assert_allclose(values, initial_alpha("cosine", 10), rtol=1e-6)
        np.testing.assert_allclose(cosine["change of alpha"][layer], 0, atol=1e-6)
        np.testing.assert_allclose(cosine["change of omega"][layer], 0, atol=1e-6)
    # "add" starts at zero, so alpha is its own change.
    assert list(power) == ["alpha", "change of omega"]


def test_runs_of_one_function_are_told_apart(make_run, tmp_path):
    small = {"target_modules": ["conv_out"], "classes": [2]}
    runs = [make_run("seed0", **small), make_run("seed1", **small), make_run("shift", function="shift", **small)]
    shutil.copytree(runs[0], tmp_path / "other" / "seed0")
    analyze_runs([*runs, tmp_path / "other" / "seed0"], tmp_path / "out")
    names = list(json.loads((tmp_path / "out" / "ranks.json").read_text()))
    assert names == [
        f"cosine, {runs[0]}",
        "cosine, seed1",
        "shift",
        f"cosine, {tmp_path / 'other' / 'seed0'}",
    ]
    assert len(list((tmp_path / "out").glob("importance_*.png"))) == 4


def test_results_come_without_matplotlib(make_run, tmp_path, monkeypatch):
    run = make_run()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="figures need matplotlib"):
        analyze_runs([run], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["coefficients.json", "ranks.json"]


def put_nan(run):
    path = run / "adapters" / "class_3" / "adapter_model.safetensors"
    saved = load_file(path)
    key = next(key for key in saved if key.endswith("funlora_A"))
    saved[key][0] = float("nan")
    save_file(saved, path)
    return key


def test_an_adapter_with_nan_is_named(make_run):
    run = make_run()
    layer = put_nan(run).removeprefix("base_model.model.").removesuffix(".funlora_A")
    with pytest.raises(ValueError, match=rf"class_3, layer {layer}: `F` has entries that are not finite"):
        measure_run(run)


def test_an_adapter_of_another_method_is_named(tiny_unet, tmp_path):
    model = get_peft_model(tiny_unet, LoraConfig(target_modules=["conv1"]))
    model.save_pretrained(tmp_path / "adapters" / "class_2")
    with pytest.raises(ValueError, match="class_2 holds a LORA adapter, expected FUNLORA"):
        measure_run(tmp_path)


def test_what_cannot_be_measured_is_named(make_run, tmp_path):
    with pytest.raises(ValueError, match="`paths` is empty"):
        analyze_runs([], tmp_path / "out")
    run = make_run()
    with pytest.raises(ValueError, match="expected every run once"):
        analyze_runs([run, run], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"nothing has no adapters/class_<id> folders"):
        measure_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match="class vectors alone: there is no F"):
        measure_run(make_run("vectors", target_modules=[]))
    other = make_run("other", function="shift", classes=[4])
    shutil.copytree(other / "adapters" / "class_4", run / "adapters" / "class_4")
    with pytest.raises(ValueError, match="class_4 has other layers or settings than class_2"):
        measure_run(run)
    assert not (tmp_path / "out").exists()


def test_rank_of_a_reduced_adapter_is_that_of_its_weight(make_run, tiny_unet):
    run = make_run(ratio=2, function="shift", num_functions=2)
    folder = run / "adapters" / "class_2"
    found = measure_adapter(folder)
    model = get_peft_model(tiny_unet, FunLoraConfig.from_pretrained(folder))
    layer = next(iter(found.rank))
    module = model.get_submodule(f"base_model.model.{layer}")
    with torch.no_grad():
        module.weight.fill_(1.0)
        state = tensors(run, 2)
        for part in ("A", "B", "alpha"):
            getattr(module, f"funlora_{part}")["default"].copy_(state[f"base_model.model.{layer}.funlora_{part}"])
    adapted = module.get_delta_weight("default")[:, :, 0, 0] + 1
    assert numerical_rank(adapted) == found.rank[layer]


def test_it_measures_runs_and_prints_a_table(tiny_pipe, tmp_path, run_example):
    write_adapters(tiny_pipe, tmp_path / "one", target_modules=["conv_out"])
    write_adapters(tiny_pipe, tmp_path / "two", target_modules=["conv_out"], function="identity")
    done = run_example("one", "two", "--output_dir", "out", cwd=tmp_path, example="analyze_adapters.py")
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]] == ["| cosine", "| identity"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "ranks.json",
        "coefficients.json",
        "rank_by_layer.png",
        "coefficients_cosine.png",
        "importance_cosine.png",
        "importance_identity.png",
    }


@pytest.mark.slow
def test_a_known_error_ends_in_one_line(tmp_path, run_example):
    (tmp_path / "empty").mkdir()
    done = run_example("empty", "--output_dir", "out", cwd=tmp_path, example="analyze_adapters.py", check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: empty has no adapters/class_<id> folders")
    assert "Traceback" not in done.stderr
