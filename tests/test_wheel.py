"""The wheel alone, in an empty directory: from `funlora train` to a class of one's own. Its dependencies are those of the tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from runs import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Where the built wheel is installed."""
    for name in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(name, reason="they build the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    # Not in the repository: hatchling reads what git ignores there, but other tests may write to it.
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*install, str(folder / "installed"), str(built)], check=True, capture_output=True)
    return folder / "installed"


@pytest.fixture
def funlora(wheel, tmp_path):
    """Runs the command in an empty directory; returns what it prints."""

    def run(*arguments):
        # Before the folder of the tests' own installation.
        environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(wheel / "bin" / "funlora"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_it_holds_what_commands_read_and_no_experiment(wheel):
    package = wheel / "funlora_hf"
    assert (package / "py.typed").is_file()
    assert (package / "cards" / "model_card_template.md").is_file()
    assert {path.name for path in (REPOSITORY / "src/funlora_hf/recipes").glob("*.yaml")} == {
        path.name for path in (package / "recipes").glob("*.yaml")
    }
    tiny = Path("personalization", "tiny")
    shipped = REPOSITORY / "src" / "funlora_hf" / tiny
    for file in (file for part in ("files", "concepts") for file in (shipped / part).rglob("*") if file.is_file()):
        assert (package / tiny / file.relative_to(shipped)).read_bytes() == file.read_bytes()
    assert not [name for name in ("ablation", "comparison", "examples", "tests") if (wheel / name).exists()]
    assert not (package / "jobs.py").exists()


def test_its_description_has_no_link_that_a_package_index_cannot_follow(wheel):
    (metadata,) = wheel.glob("funlora_hf-*.dist-info/METADATA")
    description = metadata.read_text(encoding="utf-8").split("\n\n", 1)[1]
    assert "Getting started (docs/getting_started.md)" in description
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert links
    assert not [link for link in links if not link.startswith("https://")]


SHORT = ["--max_train_steps", "3", "--num_samples_per_class", "4"]


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(SHORT, marks=pytest.mark.slow), pytest.param([], marks=pytest.mark.soak)],
    ids=["short", "whole"],
)
def test_from_nothing_to_a_class_of_ones_own(funlora, tmp_path, arguments):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn, of the extra `demo`")
    assert "digits_2-2" in funlora("recipes").split()
    funlora("train", *arguments)
    results = json.loads((tmp_path / "outputs/digits/results.json").read_text())
    assert results["zero_forgetting"]["identical"] is True
    assert len(results["A"]) == 5
    if not arguments:
        assert results["LA"] > 95
        assert results["held_out_loss"]["mean"] < 0.48

    (tmp_path / "cross").mkdir()
    for index in range(5):
        image = np.zeros((8, 8), dtype=np.uint8)
        image[:, 3 + index % 2] = image[3 + index // 2] = 255
        PIL.Image.fromarray(image).save(tmp_path / "cross" / f"{index}.png")
    funlora("add", "cross", "--to", "outputs/digits", *arguments[:2])
    (added,) = json.loads((tmp_path / "outputs/digits/results.json").read_text())["added"].values()
    assert added["class_name"] == "cross"
    assert "class 10 (cross)" in funlora("info", "outputs/digits")
    assert "made for this base" in funlora("verify", "outputs/digits")
    funlora("sample", "outputs/digits", "--classes", "cross", "7", "--output", "mine.png")
    with PIL.Image.open(tmp_path / "mine.png") as image:
        assert image.size[0] > 4 * 8
