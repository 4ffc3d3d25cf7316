"""Sizes of the growth benchmark against counts made elsewhere, and its figure."""

import json
from dataclasses import asdict

import pytest
from PIL import Image

from funlora_hf import parameters_per_class


@pytest.fixture
def scaling(benchmark, monkeypatch, small_unet):
    module = benchmark("scaling")
    for name in ("scaling", "adapter_bank"):
        monkeypatch.setattr(benchmark(name), "paper_unet", small_unet)
    return module


def test_sizes_and_figure(scaling, small_unet, tmp_path):
    findings = scaling.measure(counts=(1, 3), peft_counts=(1, 2))
    values = {curve.name: {point.classes: point.value for point in curve.points} for curve in findings.curves}
    numbers = parameters_per_class(small_unet(), scaling.config()).with_vector
    assert values["bank: memory of the rows"] == {1: 4 * numbers / 1000, 3: 12 * numbers / 1000}
    assert values["folders: number of files"] == {1: 3, 3: 9}
    size = values["folders: their files"]
    assert size[3] == pytest.approx(3 * size[1])
    assert size[1] > values["bank: memory of the rows"][1]
    assert values["bank: its file"][3] > values["bank: memory of the rows"][3]
    assert set(values["PEFT model: add a class"]) == {1, 2}
    assert all(point.low <= point.value <= point.high for curve in findings.curves for point in curve.points)

    (tmp_path / "scaling.json").write_text(json.dumps(asdict(findings)))
    scaling.draw(tmp_path / "scaling.json", tmp_path / "scaling.png")
    assert len(Image.open(tmp_path / "scaling.png").convert("RGB").getcolors(maxcolors=1 << 20)) > 10


def test_what_is_timed_leaves_a_bank_as_large_as_it_is(scaling):
    bank = scaling.filled(3)
    scaling.add(bank)()
    assert list(bank.classes) == [0, 1, 2]


def test_a_model_that_loads_has_all_classes(scaling, tmp_path):
    bank = scaling.filled(3)
    bank.save(tmp_path / "3.safetensors")
    assert list(scaling.load(tmp_path, bank)().classes) == [0, 1, 2]
