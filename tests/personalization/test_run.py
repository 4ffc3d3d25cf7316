"""A whole run: what it writes, how it goes on, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from concept_runs import make_arguments, run
from concept_strategies import contents, write_pictures

from funlora_hf.continual.termination import Terminated, Termination
from funlora_hf.continual.time_limit import TimeLimitReached
from funlora_hf.personalization.batches import ConceptBatches
from funlora_hf.personalization.run import ConceptRunArguments, personalize
from funlora_hf.utils.locks import FolderInUseError, folder_lock


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
KEYS = [
    "strategy",
    "concepts",
    "scores",
    "floor",
    "ceiling",
    "base_drift",
    "zero_forgetting",
    "numbers_per_concept",
    "bytes_kept",
    "seconds",
]
VARYING = ("seconds", "environment", "settings")


def steady(results):
    """What does not depend on time and place."""
    return json.loads(json.dumps({name: value for name, value in results.items() if name not in VARYING}))


def test_results_of_a_strategy_that_changes_nothing(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results.keys() >= set(KEYS)
    assert results["concepts"] == ["b0", "c1"]
    assert results["scores"].keys() == {"clip_i", "clip_t", "clip_score", "leak"}
    for name, found in results["scores"].items():
        assert found.keys() == {"matrix", "own", "end", "forgetting", "drop"}
        (first,), (again, second) = found["matrix"]
        assert first == again
        assert found["own"] == pytest.approx((first + second) / 2), name
        assert found["forgetting"] == found["drop"] == 0
    assert results["floor"].keys() == results["ceiling"].keys() == {"clip_i", "clip_t", "clip_score"}
    assert results["zero_forgetting"] == {"identical": True, "changed": []}
    drift = results["base_drift"]
    assert drift["after_task"][0]["same"] == 1.0
    assert drift["with_concept"].keys() == {"b0", "c1"}
    assert drift["with_concept"]["b0"]["same"] < 1.0
    weights = [path for name in ("b0", "c1") for path in (folder / "concepts" / name).glob("*.safetensors")]
    assert len(weights) == 4
    (pair,) = results["pairs"]
    assert pair["prompt"] == "a photo of a <v0> b and a <v1> c"
    assert pair["scores"].keys() == {"b0", "c1"}
    assert pair["scores"]["b0"].keys() == {"clip_i", "clip_t", "clip_score"}
    assert results["bytes_kept"] == sum(path.stat().st_size for path in weights)
    assert results["training_losses"].keys() == {"concept_b0", "concept_c1"}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "training_loss.png",
        "samples_task_1.png",
        "samples_task_2.png",
    }


def test_results_of_a_strategy_that_changes_the_past(inputs, tmp_path):
    results = run(inputs, tmp_path / "run", strategy="naive_lora")
    assert results["zero_forgetting"] == {"identical": None, "changed": []}
    (first,), (again, second) = results["scores"]["clip_i"]["matrix"]
    assert first != again
    found = results["scores"]["clip_i"]
    assert found["drop"] == pytest.approx(first - again)
    assert found["forgetting"] == pytest.approx(max(first - again, 0))
    assert found["end"] == pytest.approx((again + second) / 2)
    assert all(0 <= one["same"] < 1 for one in results["base_drift"]["after_task"])
    assert {path.name for path in (tmp_path / "run/model").iterdir()} >= {"unet", "model_index.json", "tokenizer"}


def test_concepts_have_the_same_results_in_any_order(inputs, finished, tmp_path):
    """Of a strategy that learns each for itself, to the bit."""
    folder, _ = finished
    run(inputs, tmp_path / "run", concept_order=["b2", "c1", "b0"], evaluation=False)
    found, expected = contents(tmp_path / "run"), contents(folder)
    for name in ("b0", "c1"):
        assert (
            found[f"concepts/{name}/adapter_model.safetensors"]
            == expected[f"concepts/{name}/adapter_model.safetensors"]
        )


@pytest.mark.parametrize("strategy", ["funlora", "custom_diffusion"])
def test_a_run_that_failed_in_its_evaluation_goes_on(strategy, inputs, tmp_path, monkeypatch):
    how = {"strategy": strategy, "with_prior_preservation": True, "num_class_images": 2, "prior_loss_weight": 0.5}
    expected = run(inputs, tmp_path / "whole", **how)
    from funlora_hf.personalization import evaluator

    draw, left = evaluator.draw, [8 if strategy == "funlora" else 11]

    def failing(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise MemoryError
        return draw(*args, **kwargs)

    monkeypatch.setattr(evaluator, "draw", failing)
    with pytest.raises(MemoryError):
        run(inputs, tmp_path / "parts", **how)
    assert list((tmp_path / "parts/checkpoints/evaluation").rglob("*.json"))
    found = run(inputs, tmp_path / "parts", **how, resume_from_checkpoint="latest")
    assert steady(found) == steady(expected)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_run_that_was_stopped_goes_on(finished, inputs, tmp_path, monkeypatch):
    """By its time limit, before the first concept, and by a signal in the second."""
    folder, numbers, batch = tmp_path / "run", [], ConceptBatches.batch
    with pytest.raises(TimeLimitReached, match="stopped before phase 'concept_b0'"):
        run(inputs, folder, time_limit_minutes=1e-9)

    def stopping(source, *args, **kwargs):
        numbers.append(args)
        if len(numbers) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(source, *args, **kwargs)

    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch, Termination() as termination, pytest.raises(Terminated) as stopped:
        patch.setattr(ConceptBatches, "batch", stopping)
        arguments = make_arguments(inputs, folder, resume_from_checkpoint="latest")
        personalize(arguments, termination=termination)
    assert stopped.value.code == 143
    assert len(numbers) == 5
    assert not (folder / "results.json").exists()
    results = run(inputs, folder, resume_from_checkpoint="latest")
    assert steady(results) == steady(finished[1])
    assert contents(folder) == contents(finished[0])


def test_without_an_evaluation(inputs, tmp_path):
    how = {"evaluation": False}
    results = run(inputs, tmp_path / "run", **how)
    assert results["scores"] == {}
    assert results["floor"] is results["ceiling"] is results["base_drift"] is None
    assert results["zero_forgetting"]["identical"] is None
    assert not (tmp_path / "run/checkpoints/evaluation").exists()


def test_the_folder_of_a_finished_run(finished, inputs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = contents(folder)
    with pytest.raises(FileExistsError, match="holds this run, which is finished"):
        run(inputs, folder)
    for name, value in (("seed", 1), ("num_samples_per_prompt", 1), ("strategy", "lora"), ("concept_order", ["c1"])):
        with pytest.raises(ValueError, match=f"other settings: .*{name} was .* and is {value!r}".replace("[", r"\[")):
            run(inputs, folder, **{name: value}, resume_from_checkpoint="latest")
    capsys.readouterr()
    again = run(inputs, folder, resume_from_checkpoint="latest")
    assert "is finished already" in capsys.readouterr().out
    assert again == json.loads(json.dumps(finished[1]))
    with folder_lock(folder), pytest.raises(FolderInUseError):
        run(inputs, folder, overwrite_output_dir=True)
    assert contents(folder) == before
    (folder / "concepts/added").mkdir()
    with pytest.raises(ValueError, match=r"would delete added in .*concepts, which the run there has not learned"):
        run(inputs, folder, overwrite_output_dir=True)
    (folder / "concepts/added").rmdir()
    results = run(inputs, folder, overwrite_output_dir=True)
    assert steady(results) == steady(finished[1])
    assert contents(folder) == before


def test_settings_of_the_evaluation_may_not_change(inputs, tmp_path):
    """The model after an earlier task is gone."""
    how = {"strategy": "naive_lora", "evaluation": False}
    run(inputs, tmp_path / "run", **how)
    (tmp_path / "run/results.json").unlink()
    with pytest.raises(ValueError, match="evaluation was False and is True") as error:
        run(inputs, tmp_path / "run", **{**how, "evaluation": True}, resume_from_checkpoint="latest")
    assert "funlora evaluate" not in str(error.value)


def test_pictures_in_the_folder_are_not_deleted(inputs, tmp_path):
    how = {"evaluation": False, "concept_train_steps": 1}
    folder = tmp_path / "run"
    run(inputs, folder, **how)
    write_pictures(folder / "figures/pictures/b", 2, seed=0)
    entry = {"instance_data_dir": str(folder / "figures/pictures/b"), "instance_prompt": "a <v> b"}
    (tmp_path / "own.json").write_text(json.dumps([entry]))
    with pytest.raises(
        ValueError, match=r"`overwrite_output_dir` would delete .*figures, which contains `images of b`"
    ):
        run(inputs, folder, **how, concepts=str(tmp_path / "own.json"), concept_order=None, overwrite_output_dir=True)
    assert len(list((folder / "figures/pictures/b").iterdir())) == 2


def test_arguments_of_a_folder(finished, inputs, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(finished[0], folder)
    arguments = ConceptRunArguments.of(folder)
    expected = make_arguments(inputs, folder)
    assert arguments == expected
    with pytest.raises(FileNotFoundError, match="holds no run"):
        ConceptRunArguments.of(tmp_path)


REFUSED = {
    "`concept_order` has 'b1', expected some of 'b0', 'c1', 'b2'": {"concept_order": ["b1"]},
    "`concept_order` is .*, expected each name once": {"concept_order": ["b0", "b0"]},
    "`strategy` is 'ddgr', expected": {"strategy": "ddgr"},
    "`strategy_options` has 'rank', but `strategy` 'funlora' expects none": {"strategy_options": ["rank=3"]},
    "`timestep_density` is 'logit_normal', expected 'uniform' or 'stratified': DDIMScheduler is no flow": {
        "timestep_density": "logit_normal"
    },
    "`num_class_images` is 3 but there is no `with_prior_preservation`": {"num_class_images": 3},
    "`prior_loss_weight` is 0.5 but there is no `with_prior_preservation`": {"prior_loss_weight": 0.5},
    "`revision` is 'main', but the package's own base has none": {
        "revision": "main",
        "pretrained_model_name_or_path": "tiny",
    },
    "`drop_t5` is True, expected False": {"drop_t5": True},
    "`clip_model` is .*, but `evaluation` is False": {"evaluation": False, "clip_model": "clip"},
    "`num_samples_per_prompt` is 2, but `evaluation` is False": {
        **{"evaluation": False, "num_samples_per_prompt": 2},
        **{"with_prior_preservation": True},
    },
    "`guidance_scale` is 3.0, but `evaluation` is False": {"evaluation": False, "guidance_scale": 3.0},
    "`target_modules` is ..": {"target_modules": []},
    "`function` is 'sine'": {"function": "sine"},
    "`concept_train_steps` is 3 and `concept_epochs` is 2": {"concept_epochs": 2},
    "`mixed_precision` is 'fp8'": {"mixed_precision": "fp8"},
    "`report_to` 'nothing'": {"report_to": "nothing"},
    "`resolution` should be a positive integer value but the value passed is 0": {"resolution": 0},
    "`resolution` is 12, expected a multiple of 8": {"resolution": 12},
    "`resolution` is 16, expected 32 or None": {
        **{"resolution": 16, "pretrained_model_name_or_path": "tiny"},
        **{"concepts": "tiny", "concept_order": None},
    },
    "`token_learning_rate` is 0.02, but `train_token` is False": {"train_token": False},
    "with base_fraction=0.1 and general_share=0": {"strategy": "cns", "strategy_options": ["general_share=0"]},
    "there is no such file or folder": {"concepts": "nowhere.json"},
    "nowhere": {"clip_model": "/nowhere"},
}


@pytest.mark.parametrize("error", REFUSED)
def test_refused_before_anything_is_written(error, inputs, tmp_path):
    with pytest.raises((ValueError, OSError), match=error):
        run(inputs, tmp_path / "run", **REFUSED[error])
    assert not (tmp_path / "run").exists()


# By name of the argument: values that do not come to the same weights as those of `make_arguments`.
ACTING = {
    "resolution": 16,
    "random_flip": True,
    "target_modules": ["attention"],
    "rank": 2,
    "function": "power",
    "num_functions": 3,
    "ratio": 1,
    "num_vectors": 2,
    "train_token": False,
    "with_prior_preservation": True,
    "snr_gamma": 0.5,
    "noise_offset": 0.5,
    "strategy": "lora",
    "seed": 1,
    "mixed_precision": "bf16",
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1e-3,
    "max_train_steps": 2,
    "concept_train_steps": 4,
    "concept_batch_size": 3,
    "concept_learning_rate": 1e-3,
    "token_learning_rate": 1e-3,
    "concept_warmup_steps": 3,
    "concept_lr_scheduler": "constant",
    "concept_weight_decay": 0.5,
    "concept_ema_decay": 0.1,
    "concept_ema_warmup": False,
    "concept_ema_start": 0.9,
}


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    return _weights(inputs, tmp_path_factory.mktemp("plain") / "run", {})


def _weights(inputs, folder, given):
    how = {"evaluation": False, "concept_order": ["b0"]}
    if given.get("train_token") is False:
        how["token_learning_rate"] = None
    run(inputs, folder, **how, **given)
    return {path: data for path, data in contents(folder).items() if path.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTING)
def test_each_setting_acts(name, plain, inputs, tmp_path):
    given = {name: ACTING[name]}
    if name == "with_prior_preservation":
        given["num_class_images"] = 2
    assert _weights(inputs, tmp_path / "run", given) != plain


@pytest.mark.slow
def test_half_precision_runs(inputs, tmp_path):
    results = run(inputs, tmp_path / "run", mixed_precision="bf16")
    assert results["zero_forgetting"]["identical"] is True
    assert all(torch.tensor(losses).isfinite().all() for losses in results["training_losses"].values())


def test_prior_images_are_drawn_once_by_the_base(inputs, tmp_path):
    how = {"evaluation": False}
    how |= {"with_prior_preservation": True, "num_class_images": 2, "concept_order": ["b0", "b2"]}
    run(inputs, tmp_path / "run", **how)
    folder = tmp_path / "run/checkpoints/class_images"
    # Both have the same class.
    assert [path.name for path in folder.iterdir()] == ["a_b"]
    assert len(list(folder.rglob("*.png"))) == 2
