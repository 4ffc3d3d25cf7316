"""A strategy of another installed package runs by its name; what is not one is refused, with the package's name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from funlora_hf.continual.strategies.registry import strategy_class
from funlora_hf.personalization.strategies.registry import concept_strategy


MODULE = """
from funlora_hf.continual.strategies.finetune import Finetune
from funlora_hf.personalization.strategies.per_concept import Lora

class Mine(Finetune):
    name = "mine"

class Plain(Lora):
    name = "plain"

class Other(Finetune):
    name = "another"
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution with these entry points, as a wheel would lie in site-packages."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugged_in", raising=False)
    (tmp_path / "plugged_in.py").write_text(MODULE)

    def install(*points: str, package: str = "my-strategies"):
        folder = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("\n".join(["[funlora_hf.strategies]", *points]))
        return tmp_path

    return install


def test_both_worlds(install):
    install("mine = plugged_in:Mine", "plain = plugged_in:Plain")
    assert strategy_class("mine").__name__ == "Mine"
    assert concept_strategy("plain").__name__ == "Plain"


def test_a_run_by_the_command(install, tmp_path):
    install("mine = plugged_in:Mine")
    arguments = ["--strategy", "mine", "--num_tasks", "2", "--max_train_steps", "2", "--no_evaluation"]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from funlora_command import main; main()"
    command = [sys.executable, "-c", code, "train", *arguments, "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "out" / "model").is_dir()


def test_a_broken_one_harms_only_who_asks_for_it(install):
    install("broken = no_such_module:Mine")
    assert strategy_class("funlora").name == "funlora"
    with pytest.raises(
        ValueError, match=r"'broken' of the package my-strategies cannot be imported \(ModuleNotFoundError"
    ):
        strategy_class("broken")


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("mine = plugged_in:Plain", "is plugged_in:Plain, expected a subclass of Strategy here"),
        ("mine = plugged_in:MODULE", "cannot be imported"),
        ("mine = plugged_in:Other", "has the `name` 'another', expected that of its entry point"),
        ("funlora = plugged_in:Mine", "'funlora' is brought by my-strategies, but there is another one of this name"),
    ],
)
def test_refused(install, point, message):
    install(point)
    with pytest.raises(ValueError, match=message):
        strategy_class(point.split()[0])


def test_an_unknown_name_is_told_all(install):
    install("mine = plugged_in:Mine")
    with pytest.raises(ValueError, match=r"`strategy` is 'min', expected one of: 'funlora', .*'mine'"):
        strategy_class("min")
