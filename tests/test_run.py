"""Whole runs in this process: the output contract, strategies, adding and updating classes, bad input."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from peft import PeftModel
from runs import digests, run_in, short_run
from safetensors.torch import load_file
from strategies import RANKS
from torch import distributed

from funlora_hf import BaseMismatchError, FunLoraPipeline
from funlora_hf.classifier import ClassifierConfig, predict, train_classifier
from funlora_hf.cli import main
from funlora_hf.continual import time_limit
from funlora_hf.continual import trainer as trainer_module
from funlora_hf.continual.base import find_base
from funlora_hf.continual.config import ContinualTrainingArguments
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.time_limit import TimeLimitReached
from funlora_hf.continual.trainer import NonFiniteLossError
from funlora_hf.data.class_ids import assign_class_ids
from funlora_hf.data.image_data import load_image_data
from funlora_hf.data.pixels import to_model_range
from funlora_hf.evaluation import evaluator as evaluator_module
from funlora_hf.evaluation.evaluator import RunEvaluator
from funlora_hf.evaluation.report import ForgettingError
from funlora_hf.run import Run, RunArguments, _check_launcher, evaluate, run
from funlora_hf.sampling.drawing import to_uint8
from funlora_hf.utils.files import read_json, write_json
from funlora_hf.utils.locks import FolderInUseError, folder_lock
from funlora_hf.utils.seeds import derive_seed


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, not to be changed."""
    return run_in(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    """A copy of it to work in, with the same relative path."""
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_folder_keeps_the_contract(finished):
    assert {path.name for path in finished.iterdir()} == {
        "adapters",
        "base",
        "checkpoints",
        "figures",
        "results.json",
    }
    assert {path.name for path in (finished / "adapters").iterdir()} == {f"class_{c}" for c in range(4, 10)}
    for adapter in (finished / "adapters").iterdir():
        assert {path.name for path in adapter.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    figures = {path.name for path in (finished / "figures").iterdir()}
    assert figures == {
        "accuracy.png",
        "drift.png",
        "layer_importance.png",
        "samples.safetensors",
        "training_loss.png",
        *(f"samples_task_{t}.png" for t in (1, 2, 3)),
        *(f"class_{class_id}.png" for class_id in range(10)),
    }


def test_results_have_the_contract_s_keys(finished):
    results = read_json(finished / "results.json")
    assert results["strategy"] == "funlora"
    assert results["dataset"] == "digits"
    assert results["tasks"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert results["class_order"] == list(range(10))
    matrix = results["accuracy_matrix"]
    assert [len(row) for row in matrix] == [1, 2, 3]
    A = [float(np.mean(row)) for row in matrix]
    np.testing.assert_allclose(results["A"], A)
    np.testing.assert_allclose([results["LA"], results["AIA"]], [A[-1], np.mean(A)])
    drops = [max(row[j] for row in matrix[j:]) - matrix[-1][j] for j in (0, 1)]
    np.testing.assert_allclose(results["forgetting"], np.mean(drops))
    assert set(results["held_out_loss"]["per_class"]) == {str(c) for c in range(10)}
    assert results["zero_forgetting"]["identical"] is True
    assert results["zero_forgetting"]["classes_compared"] == 10
    assert results["zero_forgetting"]["base_sha256_before"] == results["zero_forgetting"]["base_sha256_after"]
    assert {name: len(losses) for name, losses in results["training_losses"].items()} == {
        "base": 12,
        **{f"class_{class_id}": 8 for class_id in range(4, 10)},
    }
    assert all(0 < loss < 10 for losses in results["training_losses"].values() for loss in losses)
    assert results["versions"]["peft"]
    assert results["seconds"]["total"] > 0


def test_image_quality_and_drift_compare_the_samples_with_the_test_images(finished, inside):
    """Class by class, in features of a classifier that nothing in the run has touched."""
    shutil.copytree(finished, inside / "out")
    (inside / "out" / "results.json").unlink()
    restore_samples(inside / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "forget_samples", lambda self: None)
        results = run(short_run(resume_from_checkpoint="latest"))
    data = load_image_data("digits", image_size=8, channels=1, max_images_per_class=12)
    real, drawn = [], []
    for class_id in range(10):
        test = data.images(class_id, split="test")
        sampled = load_file(f"out/checkpoints/synthetic/all/class_{class_id}.safetensors")["images"]
        assert len(test) > len(sampled) == 6
        real.append(test[[len(test) * i // 6 for i in range(6)]])
        drawn.append(sampled)
    labels = torch.arange(10).repeat_interleave(12)
    recipe = ClassifierConfig(epochs=1, crop_padding=0, horizontal_flip=False)
    images = torch.cat([data.images(class_id) for class_id in range(10)])
    classifier = train_classifier(images, labels, num_classes=10, config=recipe, seed=0)
    with torch.no_grad():
        features = [classifier[:-1](to_model_range(torch.cat(part))).double() for part in (real, drawn)]
    means, covariances = [f.mean(dim=0) for f in features], [f.T.cov() for f in features]
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    distance = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross
    quality = results["image_quality"]
    assert quality == read_json(finished / "results.json")["image_quality"]
    assert quality["frechet_distance"] == pytest.approx(distance.item(), rel=1e-4)
    assert 0 <= quality["precision"] <= 1
    assert 0 <= quality["recall"] <= 1
    counts = {"extractor": "classifier", "neighbours": 5, "num_real": 60, "num_generated": 60}
    assert {name: quality[name] for name in counts} == counts
    drift, before = results["drift"], read_json(finished / "results.json")
    assert drift == before["drift"]
    recognised = results["recognised"]
    assert recognised == before["recognised"]
    shares = [(predict(classifier, images) == c).double().mean().item() for c, images in enumerate(drawn)]
    assert recognised["per_class"] == pytest.approx({str(c): 100 * share for c, share in enumerate(shares)})
    assert recognised["mean"] == pytest.approx(10 * sum(shares))
    for class_id, images in enumerate(drawn):
        rows = [row[str(class_id)] for row in drift["by_task"] if str(class_id) in row]
        assert len(rows) == 3 - [4, 8, 10].index(next(end for end in (4, 8, 10) if class_id < end))
        assert all(row == rows[0] for row in rows)  # a class that never changes
        assert rows[0]["accuracy"] == pytest.approx(
            100 * (predict(classifier, images) == class_id).double().mean().item()
        )
        tests = data.images(class_id, split="test")
        of_real, of_drawn = (classifier[:-1](to_model_range(part)).double().detach() for part in (tests, images))
        moved = (of_real.mean(dim=0) - of_drawn.mean(dim=0)).norm() / of_real.var(dim=0).sum().sqrt()
        assert rows[0]["mean"] == pytest.approx(moved.item(), rel=1e-4)
        assert drift["real"][str(class_id)]["mean"] > 0


def test_the_accuracy_that_as_many_real_images_give(finished):
    """The last task's classifier, trained on the first six real images of each class instead of on six samples."""
    data = load_image_data("digits", image_size=8, channels=1, max_images_per_class=12)
    recipe = ClassifierConfig(epochs=1, crop_padding=0, horizontal_flip=False)
    classifier = train_classifier(
        torch.cat([data.images(class_id)[:6] for class_id in range(10)]),
        torch.arange(10).repeat_interleave(6),
        num_classes=10,
        config=recipe,
        seed=derive_seed(0, "classifier", 2),
    )
    right = [(predict(classifier, data.images(c, split="test")) == c).double() for c in range(10)]
    of_tasks = [torch.cat(right[start:end]).mean().item() for start, end in ((0, 4), (4, 8), (8, 10))]
    assert read_json(finished / "results.json")["LA_real"] == pytest.approx(100 * sum(of_tasks) / 3)


def test_nothing_else_depends_on_image_quality(finished, copy, monkeypatch):
    expected = read_json(finished / "results.json")
    (copy / "results.json").unlink()
    restore_samples(copy)
    measured = []
    monkeypatch.setattr(evaluator_module, "compare_images", lambda *args, **kwargs: measured.append(args))
    results = run(short_run(resume_from_checkpoint="latest", image_quality="none"))
    assert not measured
    assert results["image_quality"] is None
    assert results["drift"] is None
    assert results["recognised"] is None
    own = {"image_quality", "drift", "recognised", "seconds", "settings"}
    assert {k: v for k, v in results.items() if k not in own} == {k: v for k, v in expected.items() if k not in own}


def test_one_sample_of_a_class_is_enough_to_finish(inside, caplog):
    quality = run(short_run(num_samples_per_class=1, num_tasks=1))["image_quality"]
    assert (quality["num_real"], quality["num_generated"], quality["neighbours"]) == (4, 4, 3)
    assert math.isfinite(quality["frechet_distance"])
    assert "by 3 neighbours instead of 5" in caplog.text


def test_a_run_of_one_class_is_not_measured(inside, caplog):
    """A classifier of one class learns nothing that images could be compared by."""
    results = run(short_run(classes_per_task=1, num_tasks=1))
    assert results["image_quality"] is None
    assert "No image quality: of the classes [0]" in caplog.text


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        ("torchmetrics", r'pip install "funlora-hf[demo]"'),
        ("training", "phase classifier: the loss is nan"),
    ],
)
def test_a_failing_measure_loses_no_results(failure, text, copy, caplog, monkeypatch):
    expected = read_json(copy / "results.json")
    (copy / "results.json").unlink()
    restore_samples(copy)
    if failure == "torchmetrics":
        monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    else:

        def diverge(*args, **kwargs):
            raise RuntimeError(text)

        monkeypatch.setattr(evaluator_module, "reference_features", diverge)
    results = run(short_run(resume_from_checkpoint="latest"))
    assert results["image_quality"] is None
    assert results["drift"] == (expected["drift"] if failure == "torchmetrics" else None)
    assert results["LA"] == expected["LA"]
    assert read_json(copy / "results.json") == results
    assert "No image quality: " in caplog.text
    assert text in caplog.text


def test_a_run_that_cannot_have_inception_does_not_begin(inside, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r'pip install "funlora-hf\[fid\]"'):
        run(short_run(image_quality="inception"))
    assert not (inside / "out").exists()


def test_a_run_measures_fid(copy, capsys, monkeypatch):
    """With a stand-in for torch-fidelity's Inception, whose features are the pixels."""

    class Pixels(torch.nn.Module):
        def __init__(self, name, features_list):
            super().__init__()

        def forward(self, x):
            return (x.flatten(1).float(),)

    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Pixels
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (copy / "results.json").unlink()
    restore_samples(copy)
    quality = run(short_run(resume_from_checkpoint="latest", image_quality="inception"))["image_quality"]
    assert quality["extractor"] == "inception"
    assert quality["frechet_distance"] > 0
    assert f"FID               {quality['frechet_distance']:>8.2f}" in capsys.readouterr().out


def test_task_accuracies_are_the_means_of_their_classes_by_images(finished):
    results = read_json(finished / "results.json")
    data = load_image_data("digits", image_size=8, channels=1, max_images_per_class=12)
    for task, row in enumerate(results["accuracy_matrix"]):
        per_class = read_json(finished / f"checkpoints/evaluation/task_{task + 1}.json")["class_accuracies"]
        assert list(per_class) == [str(c) for classes in results["tasks"][: task + 1] for c in classes]
        for classes, accuracy in zip(results["tasks"], row, strict=False):
            counts = [data.count(c, split="test") for c in classes]
            means = [per_class[str(c)] for c in classes]
            assert accuracy == pytest.approx(np.average(means, weights=counts))
    assert results["class_accuracy"] == per_class
    assert len(set(per_class.values())) > 1


def test_a_class_s_picture_shows_its_samples(copy, monkeypatch):
    """Those that are drawn again by the seed after the run has deleted them; equal samples give equal bytes."""
    before = digests(copy / "figures")
    shutil.rmtree(copy / "figures")
    (copy / "results.json").unlink()
    restore_samples(copy)
    drawn, draw = {}, RunEvaluator._draw

    def remember(self, pipe, class_id, purpose, config=None):
        samples = draw(self, pipe, class_id, purpose, config)
        if purpose == "synthetic":
            drawn[class_id] = to_uint8(samples.images)
        return samples

    monkeypatch.setattr(RunEvaluator, "_draw", remember)
    run(short_run(resume_from_checkpoint="latest"))
    assert digests(copy / "figures") == before
    for class_id, images in drawn.items():
        grid = np.asarray(PIL.Image.open(copy / "figures" / f"class_{class_id}.png"))
        assert grid.shape == (2 * 66, 4 * 66, 3)  # six images of 8x8, eight times as large, with an edge
        np.testing.assert_array_equal(grid[70:132:8, 70:132:8, 1], images[5, 0])


def test_a_record_without_accuracies_of_classes_is_reported_without(copy, monkeypatch):
    (copy / "results.json").unlink()
    restore_samples(copy)
    monkeypatch.setattr(RunFolder, "forget_samples", lambda self: None)
    expected = run(short_run(resume_from_checkpoint="latest"))
    (copy / "results.json").unlink()
    for path in (copy / "checkpoints" / "evaluation").glob("task_*.json"):
        record = read_json(path)
        del record["class_accuracies"]
        write_json(path, record)
    results = run(short_run(resume_from_checkpoint="latest"))
    assert results["class_accuracy"] is None
    assert results["accuracy_matrix"] == expected["accuracy_matrix"]


def test_parameters_per_class_are_those_of_the_file(finished):
    tensors = load_file(finished / "adapters" / "class_4" / "adapter_model.safetensors")
    results = read_json(finished / "results.json")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    vector = tensors["base_model.model.class_embedding.funlora_class_vector"].numel()
    assert results["parameters_per_class_with_vector"] == numbers
    assert results["parameters_per_class"] == numbers - vector


def test_stock_peft_loads_an_adapter_as_the_pipeline_does(finished):
    pipe = FunLoraPipeline.from_pretrained(finished / "base")
    pipe.load_adapter(finished / "adapters" / "class_7")
    unet = UNet2DModel.from_pretrained(finished / "base", subfolder="unet")
    model = PeftModel.from_pretrained(unet, finished / "adapters" / "class_7").eval()
    sample, sigma = torch.randn(4, 1, 8, 8), torch.rand(4)
    with torch.no_grad():
        theirs = model(sample, 1000 * sigma, torch.zeros(4, dtype=torch.long)).sample
        ours = pipe.predict_velocity(sample, sigma, [7] * 4)
        base = unet.get_submodule("conv_in")(sample)
    assert torch.equal(ours, theirs)
    assert base.isfinite().all()


def test_the_base_s_name_lets_stock_code_find_it(finished, monkeypatch):
    monkeypatch.chdir(finished.parent)
    config = json.loads((finished / "adapters" / "class_4" / "adapter_config.json").read_text())
    assert config["class_label"] == 4
    assert config["class_name"] == "4"
    UNet2DModel.from_pretrained(config["base_model_name_or_path"])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(finished, inside):
    run(short_run())
    assert digests(inside / "out" / "base") == digests(finished / "base")
    assert digests(inside / "out" / "adapters") == digests(finished / "adapters")
    run(short_run(seed=1, output_dir="other"))
    assert digests(inside / "other" / "adapters") != digests(finished / "adapters")


def test_a_finished_run_is_reported_again_without_training(copy, capsys, monkeypatch):
    before = digests(copy / "adapters")
    monkeypatch.setattr(trainer_module.ContinualTrainer, "train", None)
    run(short_run(resume_from_checkpoint="latest"))
    assert "is finished already" in capsys.readouterr().out
    assert digests(copy / "adapters") == before


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"resume_from_checkpoint": "latest"}, id="finished"),
        pytest.param({"update_class": 6}, id="update"),
        pytest.param({"output_dir": "new"}, id="new", marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_its_group_of_processes(arguments, copy):
    """What a process leaves of it may abort the process at its end, with all done."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        run(short_run(**arguments))
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_a_folder_with_a_run_is_refused(copy):
    before = digests(copy)
    with pytest.raises(FileExistsError, match=r"`output_dir` out holds this run, which is finished"):
        run(short_run())
    with pytest.raises(ValueError, match=r"adapter_learning_rate was 0\.03 and is 0\.1"):
        run(short_run(resume_from_checkpoint="latest", adapter_learning_rate=0.1))
    assert digests(copy) == before


def test_forgetting_fails_loudly(copy):
    """A base, or a probe, that is not what it was."""
    shutil.rmtree(copy / "figures")
    (copy / "results.json").unlink()
    probe = copy / "checkpoints" / "probes" / "class_5.json"
    write_json(probe, {**read_json(probe), "sha256": "0" * 64})
    restore_samples(copy)
    with pytest.raises(ForgettingError, match=r"classes_changed': \[5\]"):
        run(short_run(resume_from_checkpoint="latest"))
    assert read_json(copy / "results.json")["zero_forgetting"]["identical"] is False


EVALUATED = (
    "accuracy_matrix",
    "A",
    "LA",
    "AIA",
    "forgetting",
    "class_accuracy",
    "image_quality",
    "drift",
    "nfe",
    "own_classifier",
)


def forget_evaluation(folder, first_samples=False):
    """Make a run one that has been trained but not evaluated; perhaps without what it remembers of its first samples either."""
    for path in (folder / "results.json", *folder.glob("checkpoints/evaluation/task_*.json")):
        path.unlink()
    shutil.rmtree(folder / "figures")
    if first_samples:
        shutil.rmtree(folder / "checkpoints/evaluation")
        shutil.rmtree(folder / "checkpoints/probes")


@pytest.fixture(scope="module")
def not_evaluated(finished, tmp_path_factory):
    """A run that goes on without evaluation after its training, finished, not to be changed."""
    folder = tmp_path_factory.mktemp("not_evaluated")
    shutil.copytree(finished, folder / "out")
    forget_evaluation(folder / "out", first_samples=True)
    return run_in(folder, evaluation=False, resume_from_checkpoint="latest")


def test_a_run_without_evaluation_checks_that_nothing_was_forgotten_and_says_what_is_missing(finished, not_evaluated):
    results = read_json(not_evaluated / "results.json")
    assert results.keys() == read_json(finished / "results.json").keys()
    assert [results[key] for key in EVALUATED] == [None] * len(EVALUATED)
    assert results["held_out_loss"] == {"mean": None, "per_class": {}}
    assert results["held_out_loss_by_task"] == [None] * 3
    assert results["seconds"]["sampling"] == results["seconds"]["classifier"] == 0
    assert results["zero_forgetting"]["identical"] is True
    assert results["zero_forgetting"]["classes_compared"] == 10
    assert {path.name for path in (not_evaluated / "figures").iterdir()} == {
        "layer_importance.png",
        "training_loss.png",
    }


def test_evaluating_later_gives_what_evaluating_on_the_way_does(finished, not_evaluated, inside, capsys):
    shutil.copytree(not_evaluated, inside / "moved")
    later = evaluate(inside / "moved")
    expected = read_json(finished / "results.json")
    assert "LA (%)" in capsys.readouterr().out
    assert read_json(inside / "moved/results.json") == later
    timed = ("seconds", "settings", "environment")
    assert {k: v for k, v in later.items() if k not in timed} == {k: v for k, v in expected.items() if k not in timed}
    assert later["settings"]["EvaluationArguments"] == expected["settings"]["EvaluationArguments"]
    figures = digests(inside / "moved/figures")
    assert figures == digests(finished / "figures")
    assert not (inside / "moved/checkpoints/synthetic").exists()


def test_evaluating_again_takes_other_settings_and_changes_nothing_else(copy, capsys):
    write_json(copy / "results.json", {**read_json(copy / "results.json"), "added": {"10": {"class_name": "owl"}}})
    before = digests(copy)
    fewer = replace(RunArguments.of(copy).evaluation, num_samples_per_class=3, image_quality="none")
    results = evaluate(copy, fewer)
    assert load_file(copy / "figures/samples.safetensors")["task_3/class_9"].shape == (3, 1, 8, 8)
    assert "class 10 (owl) was added and is not evaluated" in capsys.readouterr().out
    assert results["settings"]["EvaluationArguments"]["num_samples_per_class"] == 3
    assert results["zero_forgetting"]["identical"] is True
    after = digests(copy)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert all(re.match(r"results\.json|figures/|checkpoints/evaluation/task_", name) for name in changed), changed
    # Not of the training: it is still the same run.
    assert run(short_run(resume_from_checkpoint="latest"))["nfe"] == results["nfe"]


def test_evaluation_that_cannot_be_is_refused(copy):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        evaluate(copy / "base")
    with pytest.raises(ValueError, match=r"num_samples_per_class was 6 and is 3.*`funlora evaluate out`"):
        run(short_run(resume_from_checkpoint="latest", num_samples_per_class=3))
    with pytest.raises(ValueError, match="`evaluation` is False"):
        evaluate(copy, replace(RunArguments.of(copy).evaluation, evaluation=False))
    with folder_lock(copy), pytest.raises(FolderInUseError):
        evaluate(copy)
    shutil.rmtree(copy / "adapters/class_9")
    before = digests(copy)
    with pytest.raises(ValueError, match=r"Task 3 .* one of its classes is gone"):
        evaluate(copy)
    assert digests(copy) == before
    (copy / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a finished run"):
        evaluate(copy)


def test_how_a_run_is_evaluated_may_change_until_it_is_finished(copy, caplog):
    """All tasks are evaluated by the new settings; first samples are compared as they were drawn."""
    caplog.set_level("INFO")
    (copy / "results.json").unlink()
    results = run(
        short_run(resume_from_checkpoint="latest", num_samples_per_class=3, num_probe_samples=1, image_quality="none")
    )
    assert results["zero_forgetting"]["identical"] is True
    assert load_file(copy / "figures/samples.safetensors")["task_1/class_0"].shape == (3, 1, 8, 8)
    assert (
        f"task 2 of 3: classes 4, 5, 6, 7 learned in {sum(results['seconds']['training_per_task'][1:2]):.0f} s, accuracy "
        in (caplog.text)
    )
    assert "task 3 of 3: classes 8, 9 learned" in caplog.text


def test_of_a_generator_that_changed_the_last_state_is_evaluated(inside, caplog, capsys):
    shared = {"strategy": "finetune", "classes_per_task": 5, "base_train_steps": 2, "adapter_train_steps": 1}
    shared |= {"image_quality": "none", "num_samples_per_class": 2, "num_inference_steps": 1}
    on_the_way = run(short_run(**shared))
    shutil.copytree("out", "later")
    # What was measured on the way stays, with its pictures.
    assert evaluate("out")["accuracy_matrix"] == on_the_way["accuracy_matrix"]
    samples = load_file("out/figures/samples.safetensors")
    assert digests(inside / "out/figures") == digests(inside / "later/figures")
    assert "not evaluated" not in caplog.text
    forget_evaluation(inside / "later")
    run(short_run(**shared, output_dir="later", resume_from_checkpoint="latest", evaluation=False))
    capsys.readouterr()
    later = evaluate("later")
    assert "Task 1 is not evaluated: the generator has learned a later task since" in caplog.text
    assert "A_t (%)                  - " in capsys.readouterr().out
    assert later["accuracy_matrix"] == [None, on_the_way["accuracy_matrix"][-1]]
    assert later["A"] == [None, on_the_way["LA"]]
    assert (later["LA"], later["AIA"], later["forgetting"]) == (on_the_way["LA"], None, None)
    assert later["held_out_loss_by_task"] == [None, on_the_way["held_out_loss_by_task"][1]]
    last = {name: tensor for name, tensor in samples.items() if name.startswith("task_2/")}
    torch.testing.assert_close(load_file("later/figures/samples.safetensors"), last, rtol=0, atol=0)


def test_samples_drawn_elsewhere_are_not_compared(copy, caplog):
    (copy / "results.json").unlink()
    for probe in (copy / "checkpoints" / "probes").iterdir():
        write_json(probe, {"sha256": "0" * 64, "environment": {"machine": "another"}})
    restore_samples(copy)
    zero_forgetting = run(short_run(resume_from_checkpoint="latest"))["zero_forgetting"]
    assert zero_forgetting["identical"] is None
    assert zero_forgetting["classes_compared"] == 0
    assert "drawn on another machine or thread count" in caplog.text


def restore_samples(folder):
    """The samples are deleted at the end of a run; forget the last tasks' records, so that they are drawn again."""
    for record in (folder / "checkpoints" / "evaluation").glob("task_*.json"):
        record.unlink()


@pytest.mark.parametrize("strategy", ["frozen", "joint"])
def test_other_strategies_run_to_the_end(strategy, inside):
    results = run(short_run(strategy=strategy))
    assert results["strategy"] == strategy
    assert len(results["A"]) == 3
    if strategy == "frozen":
        tensors = load_file("out/adapters/class_9/adapter_model.safetensors")
        assert list(tensors) == ["base_model.model.class_embedding.funlora_class_vector"]
        assert results["parameters_per_class"] == 0
        assert results["parameters_per_class_with_vector"] == 32
        assert results["zero_forgetting"]["identical"] is True
    else:
        assert results["zero_forgetting"] is None
        pipe = FunLoraPipeline.from_pretrained("out/model")
        assert pipe.base_classes == list(range(10))
        assert read_json(inside / "out/checkpoints/seconds/joint.json")["steps"] == 12 + 6 * 8


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replay", "finetune", "merge_orthogonal", "ddgr", "guide"])
def test_strategies_that_change_past_classes_run_to_the_end(strategy, inside, capsys):
    options = (
        {"num_inference_steps": 1, "classifier_train_steps": 2} if strategy in ("replay", "ddgr", "guide") else {}
    )
    results = run(short_run(strategy=strategy, strategy_options=options, **RANKS.get(strategy, {})))
    assert results["strategy_options"] == options
    assert results["zero_forgetting"] is None
    assert "parameters_per_class" in results
    assert FunLoraPipeline.from_pretrained("out/model").base_classes == list(range(10))
    assert [sorted(map(int, losses)) for losses in results["held_out_loss_by_task"]] == [
        [*range(n)] for n in (4, 8, 10)
    ]
    assert results["held_out_loss_by_task"][-1] == results["held_out_loss"]["per_class"]
    seconds = results["seconds"]
    assert sum(seconds["training_per_task"]) == pytest.approx(seconds["training"])
    assert [len(seconds[key]) for key in ("training_per_task", "preparation_per_task")] == [3, 3]
    phases = [read_json(path) for path in (inside / "out/checkpoints/seconds").iterdir()]
    assert sum(results["training_images_per_task"]) == sum(phase["images"] for phase in phases)
    assert results["skipped_steps"] == sum(phase["skipped_steps"] for phase in phases) == 0
    assert results["memory_per_task"][-1] == {**results["memory"], "state": 0}
    own = results["own_classifier"]
    assert (own is not None) == (strategy in ("replay", "ddgr", "guide"))
    assert own is None or [len(row) for row in own["accuracy_matrix"]] == [1, 2, 3]
    assert ("own classifier" in capsys.readouterr().out) == (own is not None)
    rows = results["drift"]["by_task"]
    assert [list(row) for row in rows] == [[str(c) for c in range(n)] for n in (4, 8, 10)]
    assert rows[0]["0"] != rows[1]["0"]
    evaluated = evaluate("out")  # samples of earlier tasks are gone, what they measured stays
    assert evaluated["drift"] == results["drift"]
    samples = load_file("out/figures/samples.safetensors")
    assert set(samples) == {f"task_{t}/class_{c}" for t, n in ((1, 4), (2, 8), (3, 10)) for c in range(n)}
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in samples.values()} == {(torch.uint8, (6, 1, 8, 8))}


def test_a_strategy_goes_on_from_an_existing_base(finished, inside):
    """With the classes of the base first, and the base as it was."""
    shutil.copytree(finished / "base", inside / "base")
    before = digests(inside / "base")
    results = run(short_run(strategy="finetune", base_model="base", unet_config=None))
    assert results["tasks"][0] == [0, 1, 2, 3]
    assert digests(inside / "base") == before
    pipe = FunLoraPipeline.from_pretrained("out/model")
    assert pipe.base_classes == list(range(10))
    assert results["memory_per_task"][0]["persistent"] > 0


def test_a_base_with_adapters_is_refused_by_a_strategy_without(finished, inside):
    shutil.copytree(finished / "base", inside / "base")
    shutil.copytree(finished / "adapters/class_4", inside / "base/adapters/class_4")
    with pytest.raises(
        ValueError, match=r"`base_model` knows the classes .* `strategy` 'finetune' needs a base without"
    ):
        run(short_run(strategy="finetune", base_model="base", unet_config=None, num_tasks=None))


def test_first_samples_are_those_that_were_judged(finished):
    samples = load_file(finished / "figures/samples.safetensors")
    assert samples["task_3/class_9"].shape == (6, 1, 8, 8)
    with PIL.Image.open(finished / "figures/class_9.png") as picture:
        # The picture of the class shows the same images, enlarged.
        corner = np.asarray(picture.convert("L"))
    shown = samples["task_3/class_9"][0, 0].numpy()
    side = corner.shape[1] // 4 // 8
    assert any(
        np.array_equal(corner[top : top + 8 * side : side, left : left + 8 * side : side], shown)
        for top in range(12)
        for left in range(12)
    )
    # A class that never changes shows the same samples after every task.
    assert torch.equal(samples["task_1/class_0"], samples["task_3/class_0"])


@pytest.mark.slow
def test_results_do_not_depend_on_matplotlib(inside, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    results = run(short_run())
    assert results["zero_forgetting"]["identical"] is True
    assert read_json(inside / "out" / "results.json")["LA"] == results["LA"]
    assert 'pip install "funlora-hf[demo]"' in caplog.text


@pytest.mark.slow
def test_the_joint_run_is_drawn_beside_another(inside):
    run(short_run(strategy="joint", output_dir="joint"))
    without = run(short_run(output_dir="without"))
    run(short_run(output_dir="with", joint_results="joint/results.json"))
    assert without["A"]
    images = [(inside / name / "figures" / "accuracy.png").read_bytes() for name in ("without", "with")]
    assert images[0] != images[1]


def test_classes_are_added_to_an_existing_base(finished, inside):
    """Another data set, of images in folders: "seven" is new to the base, "2" it knows."""
    torch.manual_seed(0)
    for name in ("seven", "2"):
        (inside / "images" / name).mkdir(parents=True)
        for index in range(5):
            pixels = torch.randint(0, 255, (20, 16, 3), dtype=torch.uint8).numpy()
            PIL.Image.fromarray(pixels).save(inside / "images" / name / f"{index}.png")
    shutil.copytree(finished / "base", inside / "mine")
    before = digests(inside / "mine")
    results = run(short_run(base_model="mine", dataset_name="images", max_images_per_class=None))
    assert digests(inside / "mine") == before
    assert not (inside / "out" / "base").exists()
    assert [path.name for path in (inside / "out" / "adapters").iterdir()] == ["class_4"]
    assert results["class_names"]["4"] == "seven"
    assert results["A"] is None  # the classifier would need real images of the classes 0, 1 and 3
    assert set(results["held_out_loss"]["per_class"]) == {"2", "4"}
    pipe = FunLoraPipeline.from_pretrained("mine")
    pipe.load_adapter("out/adapters/class_4")
    assert len(pipe(["seven", 2]).images) == 2


def test_a_base_that_knows_all_classes_is_named(finished, inside):
    run(short_run(strategy="joint"))
    with pytest.raises(ValueError, match="`dataset_name` 'digits' has only classes that `base_model` already has"):
        run(short_run(base_model="out/model", output_dir="more"))


@pytest.mark.parametrize("mode", ["continue", "retrain"])
def test_updating_a_class_changes_its_folder_alone(mode, copy):
    before = digests(copy)
    # The adapter's own settings count, whatever the command line says of others.
    run(short_run(update_class=6, update_mode=mode, max_images_per_class=6, function="power"))
    after = digests(copy)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    # The picture of the class's samples goes: it showed the adapter that was.
    assert changed == {"adapters/class_6/adapter_model.safetensors", "figures/class_6.png"}
    assert "figures/class_6.png" not in after
    FunLoraPipeline.from_pretrained(copy / "base").load_adapter(copy / "adapters" / "class_6")


@pytest.mark.slow
def test_updating_finds_the_class_by_its_name_in_another_order(inside, caplog):
    caplog.set_level("INFO")
    order = ["7", "2", "0", "9", "1", "3", "8", "5", "4", "6"]
    results = run(short_run(class_order=order))
    assert results["class_order"] == [int(text) for text in order]
    assert "dataset digits: images in column 'image', labels in column 'label'" in caplog.text
    class_id = results["class_order"][-1]
    before = digests(inside / "out")
    run(short_run(update_class=class_id))
    changed = {name for name, digest in digests(inside / "out").items() if before.get(name) != digest}
    assert changed == {f"adapters/class_{class_id}/adapter_model.safetensors"}


@pytest.mark.parametrize("mode", ["continue", "retrain"])
def test_a_class_of_another_base_is_not_updated(mode, copy):
    config = copy / "base" / "unet" / "config.json"
    write_json(config, {**read_json(config), "act_fn": "relu"})
    before = digests(copy)
    with pytest.raises(BaseMismatchError, match="class_6' was trained for another base"):
        run(short_run(update_class=6, update_mode=mode))
    assert digests(copy) == before


def test_continuing_starts_from_the_adapter_and_retraining_does_not(copy):
    path = copy / "adapters" / "class_6" / "adapter_model.safetensors"
    trained, distances = load_file(path), {}
    for mode in ("continue", "retrain"):
        run(short_run(update_class=6, update_mode=mode, adapter_train_steps=1, adapter_learning_rate=1e-6))
        distances[mode] = max((tensor - trained[key]).abs().max().item() for key, tensor in load_file(path).items())
    assert distances["continue"] < 2e-5 < 1e-3 < distances["retrain"]


def test_updating_does_not_heed_what_the_arguments_say_of_an_adapter(copy):
    shutil.copytree(copy, copy.parent / "before")
    run(short_run(update_class=6))
    expected = digests(copy / "adapters")
    shutil.rmtree(copy)
    shutil.copytree(copy.parent / "before", copy)
    # A function without omega, where the adapter's has one.
    run(short_run(update_class=6, function="shift"))
    assert digests(copy / "adapters") == expected


def test_classes_that_start_at_the_mean_keep_their_promises(finished, inside, capsys):
    """None is forgotten, and what depends on a deleted class is named and can be trained without it."""
    results = run(short_run(adapter_start="mean"))
    assert results["zero_forgetting"]["identical"] is True
    assert results["settings"]["ContinualTrainingArguments"]["adapter_start"] == "mean"
    with pytest.raises(ValueError, match="adapter_start was 'mean' and is 'cold'"):
        run(short_run(resume_from_checkpoint="latest"))
    folder, before = inside / "out" / "adapters", digests(inside / "out" / "adapters")
    run(short_run(update_class=8, update_mode="retrain"))
    after = digests(folder)
    assert {name for name in after if before[name] != after[name]} == {"class_8/adapter_model.safetensors"}
    with pytest.warns(UserWarning, match="out: class_8, class_9 started from the deleted class_4"):
        assert main(["delete", "4", "--output_dir", "out"]) == 0
    assert capsys.readouterr().out.endswith("deleted class 4 from out\n")
    with pytest.raises(ValueError, match="class 8 started from class_4, which are gone"):
        run(short_run(update_class=8, update_mode="retrain"))
    for class_id in (8, 9):
        run(short_run(update_class=class_id, update_mode="cold"))
        assert read_json(folder / f"class_{class_id}" / "adapter_config.json")["started_from"] is None
    assert not any(b"class_4" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for class_id in (5, 6, 7):  # of the first task with adapters
        weights = Path(f"class_{class_id}", "adapter_model.safetensors")
        assert (folder / weights).read_bytes() == (finished / "adapters" / weights).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"update_class": 2}, ValueError, r"`update_class` is 2, expected a class with an adapter .* class_4"),
        ({"update_class": 2, "output_dir": "nowhere"}, FileNotFoundError, "`update_class` has nothing to update"),
    ],
)
def test_updates_that_cannot_be(arguments, error, text, copy):
    before = digests(copy)
    with pytest.raises(error, match=text):
        run(short_run(**arguments))
    assert digests(copy) == before


def test_mixed_class_batches_train_all_adapters_of_a_task(inside):
    results = run(short_run(class_batches="mixed"))
    assert results["zero_forgetting"]["identical"] is True
    first = load_file("out/adapters/class_4/adapter_model.safetensors")
    second = load_file("out/adapters/class_5/adapter_model.safetensors")
    for key in first:
        assert first[key].isfinite().all()
        assert not torch.equal(first[key], second[key]), key
    assert sorted(path.stem for path in (inside / "out/checkpoints/seconds").iterdir()) == ["base", "task_2", "task_3"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"function": "identity", "operation": "add", "rank": 2, "ratio": 2, "target_modules": ["all-conv"]},
        {"max_train_steps": 2},
        *(
            pytest.param(arguments, marks=pytest.mark.slow)
            for arguments in (
                {"mixed_precision": "bf16"},
                {"gradient_accumulation_steps": 2, "timestep_density": "logit_normal"},
                {"class_order_seed": 3, "random_flip": True, "max_grad_norm": None},
                {"base_train_steps": None, "base_epochs": 2, "adapter_train_steps": None, "adapter_epochs": 1},
                {"validation_fraction": 0.3, "solver": "rk4", "base_ema_start": 0.5},
            )
        ),
    ],
)
def test_other_settings_run_to_the_end(arguments, inside):
    results = run(short_run(**arguments))
    assert results["zero_forgetting"]["identical"] is True
    assert math.isfinite(results["held_out_loss"]["mean"])
    steps = {path.stem: read_json(path)["steps"] for path in (inside / "out/checkpoints/seconds").iterdir()}
    if "base_epochs" in arguments:
        assert steps["base"] == 2 * 48 // 8
        assert steps["class_9"] == 2  # 12 images in batches of 8
    if "max_train_steps" in arguments:
        assert set(steps.values()) == {2}
    if "class_order_seed" in arguments:
        assert sorted(results["class_order"]) == list(range(10)) != results["class_order"]


def test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite(inside, monkeypatch):
    from funlora_hf.continual.strategies.funlora import FunLora

    original, calls = FunLora.training_step, []

    def failing(self, phase, batch, module):
        losses = original(self, phase, batch, module)
        if phase.name == "class_5":
            calls.append(1)
            if len(calls) == 5:
                return losses * math.nan
        return losses

    monkeypatch.setattr(FunLora, "training_step", failing)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 5 of phase 'class_5', class 5 \(5\).*class_5/step_3"):
        run(short_run(max_nonfinite_steps=0))
    assert (inside / "out/adapters/class_4").is_dir()
    assert not (inside / "out/adapters/class_5").exists()
    monkeypatch.setattr(FunLora, "training_step", original)
    assert run(short_run(resume_from_checkpoint="latest"))["zero_forgetting"]["identical"] is True


@pytest.mark.slow
def test_a_run_under_a_time_limit_goes_on_to_the_same_end(finished, inside, monkeypatch):
    """By a clock that only looking at it moves. No task is judged twice."""
    clock = itertools.count()
    monkeypatch.setattr(time_limit, "monotonic", lambda: float(next(clock)))
    judged, judge = [], RunEvaluator._accuracies
    monkeypatch.setattr(
        RunEvaluator, "_accuracies", lambda self, task, seen: judged.append(task) or judge(self, task, seen)
    )
    stops = []
    results = None
    while results is None and len(stops) < 20:
        resume = "latest" if stops else None
        try:
            results = run(short_run(time_limit_minutes=17 / 60, resume_from_checkpoint=resume))
        except TimeLimitReached as reached:
            AcceleratorState._reset_state(reset_partial_state=True)
            stops.append(str(reached))
    assert any("after step" in stop for stop in stops)
    assert [task.index for task in judged] == [0, 1, 2]
    assert digests(inside / "out" / "base") == digests(finished / "base")
    assert digests(inside / "out" / "adapters") == digests(finished / "adapters")
    expected = read_json(finished / "results.json")
    for key in ("accuracy_matrix", "held_out_loss"):
        assert results[key] == expected[key]


@pytest.mark.slow
def test_channels_last_changes_how_tensors_lie_and_nothing_on_disk(finished, inside, monkeypatch):
    from funlora_hf.continual.strategies.funlora import FunLora

    original, draw, layouts = FunLora.training_step, RunEvaluator._draw, set()

    def is_last(unet):
        return unet.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)

    def step(self, phase, batch, module):
        unet = module if phase.name == "base" else module.base_model.model
        layouts.add((phase.name, is_last(unet), batch.sample.is_contiguous(memory_format=torch.channels_last)))
        return original(self, phase, batch, module)

    def sample(self, pipe, class_id, purpose, config=None):
        layouts.add((purpose, is_last(pipe.unet)))
        return draw(self, pipe, class_id, purpose, config)

    monkeypatch.setattr(FunLora, "training_step", step)
    monkeypatch.setattr(RunEvaluator, "_draw", sample)
    results = run(short_run(channels_last=True))
    assert layouts == {
        *((name, True, True) for name in ("base", *(f"class_{class_id}" for class_id in range(4, 10)))),
        ("probe", True),
        ("synthetic", True),
    }
    for file in sorted(finished.rglob("*.safetensors")):
        if file.relative_to(finished).parts[0] in ("base", "adapters"):
            expected, tensors = load_file(file), load_file(inside / "out" / file.relative_to(finished))
            assert [(key, tensor.shape) for key, tensor in tensors.items()] == [
                (key, tensor.shape) for key, tensor in expected.items()
            ]
    expected = read_json(finished / "results.json")["held_out_loss"]["mean"]
    assert results["held_out_loss"]["mean"] == pytest.approx(expected, rel=1e-2)

    clock = itertools.count()
    monkeypatch.setattr(time_limit, "monotonic", lambda: float(next(clock)))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(TimeLimitReached, match="after step 5 of 12 of phase 'base'"):
        run(short_run(channels_last=True, time_limit_minutes=6 / 60, overwrite_output_dir=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    whole = digests(inside / "out")
    assert not any(name.startswith(("base", "adapters")) for name in whole)
    assert (
        run(short_run(channels_last=True, resume_from_checkpoint="latest"))["held_out_loss"]
        == results["held_out_loss"]
    )


@pytest.mark.parametrize("name", ["channels_last", "torch_compile"])
def test_what_changes_rounding_is_a_setting_of_the_run(name, copy):
    with pytest.raises(ValueError, match=f"{name} was False and is True"):
        run(short_run(resume_from_checkpoint="latest", **{name: True}))


def test_an_update_under_a_time_limit_goes_on_to_the_same_end(copy, monkeypatch):
    shutil.copytree(copy, copy.parent / "before")
    run(short_run(update_class=6))
    expected = digests(copy / "adapters")
    shutil.rmtree(copy)
    shutil.copytree(copy.parent / "before", copy)
    clock = itertools.count()
    monkeypatch.setattr(time_limit, "monotonic", lambda: float(next(clock)))
    with pytest.raises(TimeLimitReached, match="after step 4 of 8 of phase 'update_class_6'"):
        run(short_run(update_class=6, time_limit_minutes=5 / 60, checkpointing_steps=100))
    run(short_run(update_class=6, resume_from_checkpoint="latest"))
    assert digests(copy / "adapters") == expected


def test_an_omega_that_grows_without_bound_is_reported(inside, caplog):
    """With steps of 1000, an omega of 1..4 leaves what float32 computes well; the adapter is kept as it was learned."""
    few = {"classes_per_task": 9, "base_train_steps": 2, "adapter_train_steps": 4, "adapter_warmup_steps": 0}
    run(short_run(**few, adapter_learning_rate=1e3, image_quality="none"))
    found = re.findall(r"Class 9 \(9\): omega of layer (\S+) has grown to between (\S+) and (\S+), and", caplog.text)
    omegas = load_file("out/adapters/class_9/adapter_model.safetensors")
    grown = {
        name.removeprefix("base_model.model.").removesuffix(".funlora_omega"): (f"{w.min():.4g}", f"{w.max():.4g}")
        for name, w in omegas.items()
        if name.endswith("funlora_omega") and w.abs().max() > 1000
    }
    assert grown
    assert {layer: (low, high) for layer, low, high in found} == grown
    assert "Lower `adapter_learning_rate`" in caplog.text


@pytest.mark.soak
@pytest.mark.parametrize("classes_per_task", [2, 9_999])
def test_one_of_ten_thousand_classes_of_one_image_is_learned(classes_per_task, inside):
    """Beside few of the others in the base, and beside all of them; there are no test images, and so no accuracy."""
    count = 10_000
    shades = [np.full((8, 8), value, dtype=np.uint8) for value in range(256)]
    buffers = [io.BytesIO() for _ in shades]
    for shade, buffer in zip(shades, buffers, strict=True):
        PIL.Image.fromarray(shade).save(buffer, "png")
    rows = [{"bytes": buffers[class_id % 256].getvalue(), "path": None} for class_id in range(count)]
    labels = datasets.ClassLabel(names=[f"kind {class_id}" for class_id in range(count)])
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    table = datasets.Dataset.from_dict({"image": rows, "label": list(range(count))}, features=features)
    Path("many").mkdir()
    table.to_parquet("many/train.parquet")
    few = {"base_train_steps": 2, "adapter_train_steps": 2, "num_samples_per_class": 1, "num_probe_samples": 1}
    tasks = {"dataset_name": "many", "classes_per_task": classes_per_task, "num_tasks": 2}
    results = run(short_run(**tasks, **few, num_inference_steps=1, held_out_sigmas=1, image_quality="none"))
    assert results["zero_forgetting"]["identical"] is True
    learned = range(classes_per_task, min(2 * classes_per_task, count))
    assert sorted(path.name for path in Path("out/adapters").iterdir()) == [f"class_{c}" for c in learned]
    base = UNet2DModel.from_pretrained("out/base/unet")
    assert base.class_embedding.weight.shape[0] == classes_per_task
    assert len(results["class_names"]) == count


def test_a_huge_learning_rate_is_stopped(inside):
    with pytest.raises(NonFiniteLossError, match="Lower the learning rate"):
        run(short_run(base_learning_rate=1e3, max_grad_norm=None, base_warmup_steps=0, base_train_steps=200))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"strategy": "magic"}, "`strategy` is 'magic', expected one of: 'funlora', 'frozen', 'joint'"),
        ({"dataset_name": "digits", "classes_per_task": 0}, "`classes_per_task` should be a positive integer"),
        ({"function": "sine"}, "`function` is 'sine', expected one of"),
        ({"operation": "div"}, "`operation` is 'div', expected one of"),
        ({"time_limit_minutes": 0.0}, r"`time_limit_minutes` is 0\.0, expected a number above 0"),
        ({"max_nonfinite_steps": -1}, "`max_nonfinite_steps` is -1, expected a number of at least 0"),
        (
            {"torch_compile": True, "class_batches": "mixed"},
            "`torch_compile` is set, but `class_batches` is 'mixed'",
        ),
        ({"ratio": 0}, "`ratio` should be a positive integer"),
        ({"num_functions": 0}, "`num_functions` should be a positive integer"),
        ({"solver": "rk5"}, "`solver` is 'rk5', expected one of"),
        ({"timestep_density": "cosine"}, "`timestep_density` is 'cosine', expected one of"),
        ({"resume_from_checkpoint": "newest"}, "`resume_from_checkpoint` is 'newest', expected 'latest'"),
        ({"base_train_steps": None}, "`base_train_steps` is None and `base_epochs` is None, expected exactly one"),
        ({"adapter_epochs": 3}, "`adapter_train_steps` is 8 and `adapter_epochs` is 3, expected exactly one"),
        ({"validation_fraction": 1.5}, r"`validation_fraction` is 1\.5"),
        (
            {"unet_config": None, "dataset_name": "images"},
            "no file or folder here .*`unet_config` is None, which is the U-Net",
        ),
        ({"unet_config": "{"}, "`unet_config` is '{', expected a JSON mapping"),
        ({"unet_config": {"sample_size": 9, "block_out_channels": [8, 16]}}, "is 9, .* cannot halve 1 times"),
        ({"unet_config": {"sample_size": 8, "block_out_channels": [8, 12]}}, "`unet_config` does not make a UNet2D"),
        ({"strategy": "joint", "base_model": "mine"}, "`strategy` 'joint' trains on all tasks at once"),
        ({"report_to": "no-such-tracker"}, "`report_to` 'no-such-tracker'"),
        ({"target_modules": ["no_such_layer"]}, "no_such_layer"),
        (
            {"function": "identity", "adapter_alpha_rate": 2.0},
            "`adapter_alpha_rate` is 2, but the adapters have no alpha",
        ),
        (
            {"strategy": "frozen", "adapter_omega_rate": 2.0},
            "`adapter_omega_rate` is 2, but the adapters have no omega",
        ),
        (
            {"strategy": "naive_lora", "adapter_vector_rate": 2.0},
            "`adapter_vector_rate` is 2, which `strategy` 'naive_lora' does not use",
        ),
        (
            {"adapter_pairs": True, "adapter_batch_size": 7},
            "`adapter_batch_size` is 7, expected an even number with `adapter_pairs`",
        ),
        ({"classifier_architecture": "vit"}, "`classifier_architecture` is 'vit', expected one of: 'auto'"),
        ({"image_quality": "fid"}, "`image_quality` is 'fid', expected one of: 'classifier', 'inception', 'none'"),
        ({"image_quality_neighbours": 0}, "`image_quality_neighbours` should be a positive integer"),
        ({"strategy_options": ["merge"]}, "`strategy_options` has 'merge', expected key=value, with each key once"),
        ({"strategy_options": ["a=1", "a=2"]}, "`strategy_options` has 'a=2', expected key=value, with each key once"),
        ({"strategy_options": ["merge=svd"]}, "has 'merge', but `strategy` 'funlora' expects none: it has no options"),
        (
            {"strategy": "magmax", "strategy_options": {"scaling": 2}},
            "`scaling` is 2, which only compared='cumulative'",
        ),
        (
            {"strategy": "replay", "class_batches": "mixed"},
            "`class_batches` is 'mixed', which `strategy` 'replay' does not",
        ),
        ({"strategy": "naive_lora", "peft_method": "vanilla_add"}, "`peft_method` is 'vanilla_add', which `strategy`"),
        (
            {"strategy": "merge_orthogonal", "classes_per_task": 1, "rank": 8},
            "`orthogonal` is 'nullspace', but before the last of 9 tasks with `rank` 8",
        ),
        ({"classifier_learning_rate": -1.0}, r"`classifier_learning_rate` is -1\.0"),
    ],
)
def test_bad_arguments_are_named(arguments, text, inside):
    with pytest.raises(ValueError, match=text):
        run(short_run(**arguments))
    assert not (inside / "out").exists()


@pytest.mark.parametrize("name", ["./nowhere", "empty"])
def test_a_base_that_is_not_there_is_named(name, inside):
    (inside / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"`base_model` (is )?'{name}'"):
        run(short_run(base_model=name))


def test_a_single_task_of_all_classes_is_said(tmp_path, recwarn):
    Run(short_run(output_dir=str(tmp_path), classes_per_task=10, num_tasks=1), None).prepared()
    assert not [one for one in recwarn if "classes_per_task" in str(one.message)]
    with pytest.warns(UserWarning, match="`classes_per_task` is 20, and there are 10 classes: task 1 has all"):
        Run(short_run(output_dir=str(tmp_path), classes_per_task=20), None).prepared()


def test_one_class_alone_is_refused(inside):
    (inside / "images" / "only").mkdir(parents=True)
    PIL.Image.new("L", (8, 8)).save(inside / "images" / "only" / "1.png")
    with pytest.raises(ValueError, match="at least two classes"):
        run(short_run(dataset_name="images"))


@pytest.mark.parametrize("arguments", [{"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}])
def test_a_second_run_in_one_folder_is_refused(arguments, tmp_path):
    out = tmp_path / "out"
    (out / "adapters" / "class_4").mkdir(parents=True)
    with (
        folder_lock(out),
        pytest.raises(FolderInUseError, match=r"out is in use by process .* Wait for it or stop it"),
    ):
        run(short_run(output_dir=str(out), **arguments))
    assert [path.name for path in out.rglob("*")] == ["adapters", "class_4"]


LAUNCHED = [
    ("ACCELERATE_MIXED_PRECISION", "bf16", "`mixed_precision` is 'no'.*pass --mixed_precision bf16"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "`gradient_accumulation_steps` is 1"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ACCELERATE_DYNAMO_BACKEND"),
    ("ACCELERATE_USE_FSDP", "true", "FSDP"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism config"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
]


@pytest.mark.parametrize(("variable", "value", "text"), LAUNCHED)
def test_what_the_launcher_has_set_otherwise_is_refused(variable, value, text, inside, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=text):
        run(short_run(output_dir="out"))
    assert not (inside / "out").exists()


def test_what_the_launcher_has_set_likewise_is_taken(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    _check_launcher(ContinualTrainingArguments())


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 0.0},
        {"max_grad_norm": -1.0},
        {"base_warmup_steps": -1},
        {"adapter_warmup_steps": -5},
        {"max_nonfinite_steps": -1},
    ],
)
def test_numbers_out_of_range_are_refused_at_construction(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"`{name}` is {changes[name]}, expected"):
        ContinualTrainingArguments(**changes)


def test_the_decay_that_the_average_reached_is_reported(finished, inside):
    results = read_json(finished / "results.json")
    reached, steps = results["ema_decay_reached"], results["settings"]["ContinualTrainingArguments"]
    for phase in ("base", "adapter"):
        last = steps[f"{phase}_train_steps"] - 1
        assert reached[phase] == pytest.approx((1 + last) / (10 + last))
        assert reached[phase] < steps[f"{phase}_ema_decay"]
    run(
        short_run(output_dir="out", num_tasks=2, base_ema_warmup=False, adapter_ema_warmup=False, image_quality="none")
    )
    reached = read_json(inside / "out" / "results.json")["ema_decay_reached"]
    assert reached == {"base": 0.99, "adapter": 0.98}


def test_new_classes_avoid_the_ids_of_adapters_beside_the_base(finished, inside):
    """Which `find_base` sees for a base in the folder of a run, be the folder named from afar or from inside."""
    base = find_base(str(finished / "base"))
    assert base.source == str(finished / "base" / "unet")
    assert list(base.taken) == [4, 5, 6, 7, 8, 9]
    assert assign_class_ids(["new"], base.classes, taken=base.taken) == [10]
    shutil.copytree(finished / "base", inside / "elsewhere" / "base")
    assert find_base(str(inside / "elsewhere" / "base")).taken == {}


def test_more_tasks_than_there_are_are_refused(inside):
    with pytest.raises(
        ValueError, match="`num_tasks` is 4, but there are 3 tasks of `classes_per_task` 4: expected at most 3"
    ):
        run(short_run(num_tasks=4))
    assert not Path("out/base").exists()
