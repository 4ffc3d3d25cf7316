"""What a judge accepts of guided images: without guidance what the generator draws, and more with it."""

from __future__ import annotations

import json
import sys

import guidance_weights
import numpy as np
import pytest
from runs import SHORT, run_in
from sklearn.svm import SVC

from funlora_hf import FunLoraPipeline
from funlora_hf.data import load_image_data
from funlora_hf.sampling.drawing import draw_samples, to_uint8


COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = {"num_inference_steps": 3, "classifier_train_steps": 60, "classifier_batch_size": 20}
    how = {"base_train_steps": 60, "adapter_train_steps": 30, "classes_per_task": 2, "num_tasks": 2}
    return run_in(tmp_path_factory.mktemp("run"), strategy="replay", strategy_options=options, evaluation=False, **how)


def test_the_first_row_is_without_guidance(folder):
    rows = guidance_weights.measure(folder, [2.0, 5.0], 0.0, COUNT)
    assert [row.pop("largest_weight") for row in rows] == [0, 2, 5]
    assert rows[0] == rows[1] == rows[2]
    pipe = FunLoraPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    data = load_image_data("digits", image_size=8, channels=1, max_images_per_class=SHORT["max_images_per_class"])
    real = {c: np.stack([image.flatten() for image in data.images(c).numpy()]) for c in pipe.classes}
    judge = SVC().fit(np.concatenate([*real.values()]), np.repeat([*real], [len(one) for one in real.values()]))
    accepted = []
    for class_id in pipe.classes:
        how = {"purpose": "guidance_weights", "seed": 0, "batch_size": 250, "solver": "heun", "num_inference_steps": 3}
        drawn = to_uint8(draw_samples(pipe, class_id, COUNT, **how).images).flatten(1).numpy()
        accepted.append((judge.predict(drawn) == class_id).mean())
    assert rows[0]["accepted"] == pytest.approx(100 * np.mean(accepted))


def test_the_guiding_classifier_accepts_more(folder, tmp_path, monkeypatch, capsys):
    arguments = [
        "--largest_weights",
        "10",
        "--num_samples_per_class",
        str(COUNT),
        "--output",
        str(tmp_path / "o.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["guidance_weights.py", str(folder), *arguments, "--guidance_scale", "3"])
    guidance_weights.main()
    plain, guided = json.loads((tmp_path / "o.json").read_text())
    # Far above the quarter that noise, or images in another range than the classifier's, would get.
    assert guided["own"] > max(plain["own"], 60)
    assert f"| 10 | {guided['accepted']:.4g} |" in capsys.readouterr().out


def test_a_run_without_a_classifier_is_refused(tmp_path):
    folder = run_in(tmp_path, strategy="finetune", evaluation=False)
    with pytest.raises(ValueError, match="has kept no classifier, expected a finished run of 'replay'"):
        guidance_weights.measure(folder, [1.0], 1.0, 1)
