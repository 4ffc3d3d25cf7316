"""Concepts added to a run: as if it had had them from the start, after a stop, too; or refused with nothing written."""

from __future__ import annotations

import json
import shutil

import pytest
from concept_runs import run
from concept_strategies import contents, write_pictures

from funlora_hf.add import add_classes
from funlora_hf.cli import main
from funlora_hf.hub.concept_folders import ConceptsError
from funlora_hf.personalization.add import add_concepts
from funlora_hf.personalization.run import ConceptRunArguments
from funlora_hf.personalization.sharing import delete_concept
from funlora_hf.utils.locks import FolderInUseError, folder_lock


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
PROMPT = ["--instance_prompt", "a <v2> b"]


@pytest.fixture
def command(capsys):
    def start(*arguments):
        code = main(["add", *map(str, arguments)])
        return code, *capsys.readouterr()

    return start


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def added_files(inputs, folder):
    """The third concept of `inputs` as another run learned it."""
    run(inputs, folder, evaluation=False, concept_order=["b2", "c1"])
    return {name: data for name, data in contents(folder).items() if name.startswith("concepts/b2/")}


def differing(before, after):
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_an_added_concept_is_that_of_a_run_which_had_it_from_the_start(inputs, copied, finished, tmp_path, command):
    """To the bit: rows, adapter, record and card. Nothing else changes but results.json."""
    expected, before = added_files(inputs, tmp_path / "other"), contents(copied)
    code, out, _ = command(inputs / "b2", "--to", copied, *PROMPT)
    assert (code, "concept b2: learned from 3 images in " in out) == (0, True)
    assert f"funlora sample {copied} '--prompt=a <v2> b'" in out
    after = contents(copied)
    assert {name: after[name] for name in differing(before, after)} == expected
    results = json.loads((copied / "results.json").read_text())
    record = results["added"].pop("b2")
    assert record.keys() == {"name", "prompts", "images", "num_images", "source", "date", "seconds"}
    assert results == json.loads(json.dumps(finished[1]))
    # The same again changes nothing; other pictures of this name are refused.
    assert "concept b2: already exists" in command(inputs / "b2", "--to", copied, *PROMPT)[1]
    assert contents(copied) == after
    write_pictures(tmp_path / "b2", 2, seed=9)
    assert "has already, or has yet to learn: b2. Nothing" in command(tmp_path / "b2", "--to", copied, *PROMPT)[2]
    assert delete_concept("b2", output_dir=copied) == ["output_dir"]
    assert contents(copied) == before
    assert json.loads((copied / "results.json").read_text())["added"] == {}
    assert len(list((copied / "figures").glob("samples_task_*.png"))) == 2
    assert not list(copied.rglob("*b2*"))


def test_with_prior_preservation(inputs, tmp_path):
    how = {"evaluation": False, "with_prior_preservation": True, "num_class_images": 2, "strategy": "lora"}
    run(inputs, tmp_path / "all", **how, concept_order=["b0", "c1"])
    run(inputs, tmp_path / "run", **how, concept_order=["b0"])
    entry = {"instance_data_dir": str(inputs / "c1"), "instance_prompt": "a <v1> c", "eval_prompts": ["a {}", "{} d"]}
    (tmp_path / "own.json").write_text(json.dumps([entry]))
    added = add_concepts(tmp_path / "own.json", tmp_path / "run")
    assert added.trained == ("c1",)
    one, other = (
        {name: data for name, data in contents(tmp_path / folder).items() if name.startswith("concepts/")}
        for folder in ("run", "all")
    )
    assert one == other


def test_a_stop_is_resumed(inputs, copied, tmp_path, capsys, monkeypatch):
    from funlora_hf.continual import trainer

    expected = added_files(inputs, tmp_path / "other")
    save, steps = trainer.save_checkpoint, []

    def failing(*args, **kwargs):
        save(*args, **kwargs)
        raise MemoryError

    monkeypatch.setattr(trainer, "save_checkpoint", failing)
    with pytest.raises(MemoryError):
        add_concepts(inputs / "b2", copied, instance_prompt="a <v2> b", checkpointing_steps=2)
    assert (copied / "checkpoints/added/concept_b2").is_dir()
    assert not (copied / "concepts/b2").exists()
    capsys.readouterr()
    assert main(["info", str(copied)]) == 0
    assert "unfinished concept b2. To go on: the `funlora add` command" in capsys.readouterr().out
    monkeypatch.setattr(trainer, "save_checkpoint", save)
    step = trainer.ContinualTrainer._step
    monkeypatch.setattr(trainer.ContinualTrainer, "_step", lambda *a: steps.append(a[4]) or step(*a))
    assert add_concepts(inputs / "b2", copied, instance_prompt="a <v2> b").trained == ("b2",)
    assert steps == [2]
    assert {name: data for name, data in contents(copied).items() if name in expected} == expected


def test_an_unfinished_run_takes_concepts_and_goes_on(inputs, finished, copied):
    (copied / "results.json").unlink()
    (copied / "checkpoints/evaluation/after.json").unlink()
    shutil.rmtree(copied / "concepts/c1")
    with pytest.raises(ValueError, match="has already, or has yet to learn: c1"):
        add_concepts(inputs / "c1", copied, instance_prompt="a <v8> c")
    with pytest.raises(ValueError, match=r"the token '<v1>' of concept .* equals the token '<v1>' of concept"):
        add_concepts(inputs / "b2", copied, instance_prompt="a <v1> b")
    add_concepts(inputs / "b2", copied, instance_prompt="a <v2> b")
    results = run(inputs, copied, resume_from_checkpoint="latest")
    assert results["concepts"] == ["b0", "c1"]
    assert results["added"].keys() == {"b2"}
    assert results["scores"] == finished[1]["scores"]


def test_nothing_is_written_for_what_is_refused(inputs, copied, command, tmp_path):
    before = sorted(copied.rglob("*"))
    for arguments, message in (
        ([inputs / "b2", "--instance_prompt", "a <v0> b"], "equals the token '<v0>' of concept"),
        ([inputs / "b0", *PROMPT], "has already, or has yet to learn: b0"),
        ([inputs / "b2", "--instance_prompt", "b"], "expected one token such as <new1>"),
        ([inputs / "nowhere", *PROMPT], "`images` is "),
        ([inputs / "concepts.json"], "has already, or has yet to learn: b0, c1"),
        ([inputs / "concepts.json", *PROMPT], "is neither one folder of pictures nor a data set"),
    ):
        code, _, err = command(*arguments, "--to", copied)
        assert (code, message in err) == (1, True), err
    with folder_lock(copied), pytest.raises(FolderInUseError):
        add_concepts(inputs / "b2", copied, instance_prompt="a <v2> b")
    assert {path for path in copied.rglob("*") if "added" not in path.parts} == set(before)
    with pytest.raises(SystemExit) as stopped:
        command(inputs / "b2", "--to", copied, "--class_name", "b")
    assert stopped.value.code == 2


def test_a_run_with_one_model_is_refused(inputs, tmp_path, command):
    run(inputs, tmp_path / "run", strategy="naive_lora", concept_order=["b0"], evaluation=False)
    before = contents(tmp_path / "run")
    code, _, err = command(inputs / "b2", "--to", tmp_path / "run", *PROMPT)
    assert code == 1
    assert "`strategy` 'naive_lora', with which concepts change how others are drawn" in err
    assert "a run of one of: funlora, lora, textual_inversion" in err
    assert contents(tmp_path / "run") == before


def test_classes_are_not_added_to_concepts_or_concepts_to_classes(finished, inputs, tmp_path, command):
    with pytest.raises(ConceptsError, match="has concepts of a text-to-image model"):
        add_classes("digits", finished[0])
    code, _, err = command(inputs / "b2", "--to", finished[0] / "concepts/b0")
    assert (code, "holds no run" in err) == (1, True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/run.json").write_text('{"ModelArguments": {}}')
    with pytest.raises(ValueError, match="holds a run of classes, expected one of `funlora personalize`"):
        ConceptRunArguments.of(tmp_path)


def test_arguments_are_those_of_the_run(inputs, tmp_path):
    with pytest.raises(ValueError, match="`seed` is not an argument of `add` for concepts"):
        add_concepts(inputs / "b2", tmp_path, seed=1)
