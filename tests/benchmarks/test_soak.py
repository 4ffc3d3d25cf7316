"""What a process holds grows by the adapters alone, class after class, and no class is lost; the benchmark says what it saw."""

import gc
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from PIL import Image
from runs import REPOSITORY

from funlora_hf.utils.files import read_json


BYTES_OF_NUMBER, BYTES_OF_IMAGE = 4, 8 * 8


@pytest.fixture
def soak(benchmark):
    return benchmark("soak")


@pytest.fixture
def _objects_of_others():
    """What is alive before the test is left out of collections and counts, which it would make slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_objects_of_others")
def test_a_class_adds_its_numbers_and_its_test_images_and_nothing_else(soak, tmp_path):
    done = soak.learn(
        tmp_path,
        12,
        base_train_steps=4,
        adapter_train_steps=2,
        num_inference_steps=2,
        classifier_epochs=1,
        image_quality="none",
    )
    assert [look.classes for look in done.looks] == list(range(4, 13))
    numbers = done.results["parameters_per_class_with_vector"]
    # The first adapter wraps layers, once for all.
    for before, after in itertools.pairwise(done.looks[1:]):
        assert after.modules == before.modules
        assert after.tensors == before.tensors + 2
        added = numbers * BYTES_OF_NUMBER + soak.TEST_IMAGES * BYTES_OF_IMAGE
        assert after.tensor_bytes == before.tensor_bytes + added
    assert max(look.open_files for look in done.looks[2:]) <= done.looks[1].open_files
    forgetting = done.results["zero_forgetting"]
    assert forgetting["classes_compared"] == 12
    assert forgetting["identical"] is True
    assert forgetting["base_sha256_before"] == forgetting["base_sha256_after"]


def made_up(soak, leak: int):
    """60 classes, of which each leaves `leak` tensors of 1 MB behind, and is judged in as many milliseconds as it is late."""
    looks = [
        soak.Look(
            classes=number,
            learning=None if number == 4 else 0.5,
            sampling=0.1,
            judging=number / 1000,
            yardstick=0.2,
            memory=100_000_000 + leak * number * 1_000_000,
            tensors=leak * number,
            modules=7,
            tensor_bytes=leak * number * 1_000_000,
            open_files=5,
        )
        for number in range(4, 61)
    ]
    forgetting = {"classes_compared": 60, "classes_changed": [3], "base_sha256_before": "a", "base_sha256_after": "a"}
    seconds = {"total": 60.0, "report": 2.0}
    return soak.Soak(looks, {"zero_forgetting": forgetting, "seconds": seconds}, 200_000_000)


def test_a_leak_and_a_class_that_was_lost_show(soak, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "learn", lambda folder, classes: made_up(soak, leak=2))
    findings = soak.measure(60)
    assert findings.facts["memory at class 60 / at class 20, goal <= 1.1"] == 220 / 140
    assert findings.facts["tensors that a class adds to the process"] == 2
    assert findings.facts["bytes of tensors that a class adds to the process"] == 2_000_000
    assert findings.facts["modules that a class adds to the process"] == 0
    assert findings.facts["classes whose first samples had changed by a bit"] == 1
    by_name = {curve.name: {point.classes: point.value for point in curve.points} for curve in findings.curves}
    assert by_name[soak.MEMORY] == {20: 140.0, 40: 180.0, 60: 220.0}
    assert by_name[soak.JUDGE] == {20: 12.5, 40: 30.5, 60: 50.5}
    assert [round(row.ratio, 3) for row in findings.rows] == [1, 1, 1, 1.656, 1]

    (tmp_path / "soak.json").write_text(json.dumps(asdict(findings)))
    soak.draw(tmp_path / "soak.json", tmp_path / "soak.png")
    assert len(Image.open(tmp_path / "soak.png").convert("RGB").getcolors(maxcolors=1 << 20)) > 10


@pytest.mark.soak
def test_200_classes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = os.fspath(REPOSITORY / "benchmarks" / "soak.py")
    done = subprocess.run(
        [sys.executable, script, "--output_dir", os.fspath(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_json(tmp_path / "soak.json")
    series, facts = record["series"], record["facts"]
    memory = dict(zip(series["classes"], series["resident memory (MB)"], strict=True))
    assert memory[200] <= 1.1 * memory[20]
    assert facts["classes whose first samples were drawn again at the end"] == 200
    assert facts["classes whose first samples had changed by a bit"] == 0
    assert facts["base unchanged to the byte"] is True
