"""Replay: earlier concepts are drawn by the model before the task, once, whole, and only while they are needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from concept_runs import run
from concept_strategies import OPTIONS, SAMPLING, Batches, contents, learn, make_strategy
from PIL import Image
from safetensors.torch import load_file

from funlora_hf.personalization.drawing import draw
from funlora_hf.personalization.strategies import replay


class Stop(Exception):
    pass


class AfterTask:
    """Calls a function at the end of each task."""

    def __init__(self, call):
        self.end_task = call


def make_replay(folder, nouns="bcb", options=(), **training):
    options = {**OPTIONS["replay"], **dict(options)}
    return make_strategy("replay", folder, nouns=nouns, strategy_options=options, **training)


def drawn(folder: Path) -> dict[str, np.ndarray]:
    """Pixels of the pictures in a folder, by path."""
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in one piece. Do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    learn(make_replay(folder))
    return folder


def test_the_model_before_draws_with_the_captions_of_training(tmp_path):
    """What is drawn is what this model draws, by the stock pipeline; all of it is gone after the task."""
    strategy, expected, found = make_replay(tmp_path / "run"), [{}], []
    concepts, after_step, end_phase = strategy.setting.concepts, strategy.after_step, strategy.end_phase

    def end_task(task):
        assert not strategy.drawn_dir.exists()
        images = {}
        with strategy.sampling() as pipe:
            for seen in strategy.setting.seen(task):
                how = {"purpose": f"replay {task.index + 2} {concepts[seen].name}", "seed": 0, "resolution": 8}
                pixels = draw(pipe, [concepts[seen].instance_prompt] * 2, 1, **how, config=SAMPLING)
                for index, one in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
                    images[f"task_{task.index + 2}/{concepts[seen].name}/0000{index}.png"] = one
        expected.append(images)

    def step(phase):
        after_step(phase)
        if len(found) <= strategy.task_of(phase).index:
            found.append(drawn(strategy.drawn_dir))

    def ended(phase, trainable):
        """Rows of earlier concepts are as they were saved."""
        own = [name for name in trainable.parameters if name.startswith("rows.")]
        assert own == [f"rows.<v{phase.class_ids[0]}>.text_encoder"]
        for class_id in strategy.setting.past(strategy.task_of(phase)):
            saved = load_file(strategy.folder(class_id) / "learned_embeds.safetensors")[f"<v{class_id}>"]
            assert torch.equal(strategy.rows.parameters_of(f"<v{class_id}>")["text_encoder"], saved)
        end_phase(phase, trainable)

    strategy.after_step, strategy.end_phase = step, ended
    learn(strategy, listeners=[AfterTask(end_task)])
    assert [len(one) for one in found] == [0, 2, 4]
    for one, other in zip(found, expected, strict=False):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not strategy.drawn_dir.exists()


def test_real_pictures_of_earlier_concepts_are_not_read(whole, tmp_path):
    strategy = make_replay(tmp_path / "run")

    def end_task(task):
        for path in strategy.setting.concepts[task.class_ids[0]].images:
            path.unlink()

    learn(strategy, listeners=[AfterTask(end_task)])
    assert contents(tmp_path / "run") == contents(whole)


def test_a_stop_while_drawing_costs_one_concept(whole, tmp_path, monkeypatch):
    """Concepts that are drawn are not drawn again, and the run ends with the same bytes."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(kwargs["purpose"])
        if len(calls) == 3:
            raise Stop
        return draw(*args, **kwargs)

    monkeypatch.setattr(replay, "draw", failing)
    with pytest.raises(Stop):
        learn(make_replay(tmp_path / "run"))
    assert {*drawn(tmp_path / "run/checkpoints/replay")} == {"task_3/b0/00000.png", "task_3/b0/00001.png"}
    learn(make_replay(tmp_path / "run", resume_from_checkpoint="latest"))
    assert calls == ["replay 2 b0", "replay 3 b0", "replay 3 c1", "replay 3 c1"]
    assert contents(tmp_path / "run") == contents(whole)


def test_several_processes_share_the_drawing(tmp_path, monkeypatch):
    """A concept each; the pictures are those that one process draws."""
    learn(make_replay(tmp_path / "one", nouns="bc"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    found = []
    for folder, number in (("one", 1), ("two", 2)):
        for index in range(number):
            state = SimpleNamespace(process_index=index, num_processes=number)
            monkeypatch.setattr(replay, "PartialState", lambda state=state: state)
            strategy = make_replay(tmp_path / folder)
            strategy.begin_task(strategy.setting.tasks[2])
            found.append(drawn(strategy.drawn_dir))
    both, first, second = found
    assert [len(one) for one in found] == [4, 2, 4]
    assert second.keys() == both.keys() > first.keys()
    assert all(np.array_equal(second[name], both[name]) for name in both)


@pytest.mark.parametrize(
    "options", [{"images_per_concept": 3}, {"num_inference_steps": 1}, {"guidance_scale": 1.0}, {"scale_steps": False}]
)
def test_each_option_acts(options, whole, tmp_path):
    learn(make_replay(tmp_path / "run", options=options))
    found, expected = contents(tmp_path / "run"), contents(whole)
    same = [path for path, data in expected.items() if path.endswith(".safetensors") and found[path] == data]
    assert "concepts/b0/learned_embeds.safetensors" in same
    assert not {"concepts/c1/learned_embeds.safetensors", "model/unet/diffusion_pytorch_model.safetensors"} & {*same}


@pytest.mark.parametrize(
    ("options", "training", "expected"),
    [
        ({}, {}, [(4, None), (8, None), (12, None)]),
        ({"scale_steps": False}, {}, [(4, None)] * 3),
        ({}, {"concept_train_steps": None, "concept_epochs": 5}, [(None, 5), (None, 10), (None, 15)]),
    ],
)
def test_steps_grow_with_the_concepts(options, training, expected, tmp_path):
    strategy = make_replay(tmp_path / "run", options=options, **training)
    settings = [phase.settings for task in strategy.setting.tasks for phase in strategy.phases(task)]
    assert [(one.train_steps, one.epochs) for one in settings] == expected


def test_batches_hold_what_is_drawn_in_equal_shares(tmp_path):
    """Of six rows, three of the new concept and three of the other one, with its caption."""
    strategy, seen = make_replay(tmp_path / "run", nouns="bc", concept_batch_size=6), []
    training_step = strategy.training_step

    def step(phase, batch, module):
        seen.append((phase.name, sorted(zip(batch.concept_ids.tolist(), batch.captions, strict=True))))
        return training_step(phase, batch, module)

    strategy.training_step = step
    learn(strategy)
    own, other = (0, "a <v0> b"), (1, "a <v1> c")
    assert seen == [("task_1", [own] * 6)] * 4 + [("task_2", [own] * 3 + [other] * 3)] * 8


def test_what_it_takes(tmp_path):
    """Two earlier concepts, two pictures each, of 3 x 8 x 8 bytes; nothing that stays grows."""
    strategy, plain = make_replay(tmp_path / "run"), make_strategy("naive_lora", tmp_path / "plain")
    found, expected = strategy.memory_report(), plain.memory_report()
    assert found.pop("transient") == expected.pop("transient") + 2 * 2 * 3 * 8 * 8
    assert found == expected
    assert not strategy.grows_with_tasks
    assert Batches(strategy)(*strategy.phases(strategy.setting.tasks[0])).num_images == 3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"images_per_concept": 0}, "`images_per_concept`.* 0"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5, expected a whole number"),
        ({"guidance_scale": 0.5}, "`guidance_scale` is 0.5, expected a number of at least 1, at most 100"),
        ({"scale_steps": 3}, "`scale_steps` is 3, expected true or false"),
        (
            {"images_per_class": 3},
            "`strategy_options` has 'images_per_class', but `strategy` 'replay' expects some of",
        ),
    ],
)
def test_refused(options, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        make_replay(tmp_path / "run", options=options)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_on_the_tiny_base_beside_prior_preservation(inputs, tmp_path):
    tiny = {"pretrained_model_name_or_path": "tiny", "concepts": "tiny", "concept_order": ["toy1", "badge1"]}
    prior = {"with_prior_preservation": True, "num_class_images": 2}
    options = {"strategy": "replay", "strategy_options": {"images_per_concept": 2}, "concept_train_steps": 1}
    results = run(inputs, tmp_path / "run", evaluation=False, **tiny, **prior, **options)
    seconds = results["seconds"]
    assert seconds["training"] == pytest.approx(seconds["preparation"] + sum(seconds["phases"].values()))
    assert [len(losses) for losses in results["training_losses"].values()] == [1, 2]
    assert (tmp_path / "run/checkpoints/class_images").is_dir()
    assert not (tmp_path / "run/checkpoints/replay").exists()
