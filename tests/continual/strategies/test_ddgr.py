"""Guided drawing: what the classifier does to the images, what it must not do, and what is left of it at a scale of 0."""

from __future__ import annotations

import shutil

import pytest
import torch
from strategies import OPTIONS, TASKS, learn, make_strategy, stop_at

from funlora_hf.continual.strategies import generated_images
from funlora_hf.continual.strategies.ddgr import log_probability
from funlora_hf.data.pixels import to_model_range


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Folder of a run that was stopped in task 2, at a scale of 0; not to be changed."""
    folder = tmp_path_factory.mktemp("ddgr")
    strategy = with_options(folder, guidance_scale=0)
    stop_at(strategy, "task_2", 1)
    with pytest.raises(KeyboardInterrupt):
        learn(strategy)
    return folder


def with_options(folder, **options):
    return make_strategy(
        "ddgr", folder, resume_from_checkpoint="latest", strategy_options={**OPTIONS["ddgr"], **options}
    )


@pytest.fixture
def draw(begun, tmp_path):
    """Draws the images for task 2, anew for each call."""

    def drawn(**options):
        strategy = with_options(begun, **options)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        strategy.images = generated_images.GeneratedImages(folder, strategy.options, seed=0)
        return strategy.draw_past(strategy.sampler(None), TASKS[1])

    return drawn


def test_a_scale_of_zero_is_replay_to_the_bit(begun, tmp_path):
    """After the last task, of a run that was stopped in task 2, too."""
    zero = learn(with_options(shutil.copytree(begun, tmp_path / "zero"), guidance_scale=0))
    replay = learn(make_strategy("replay", tmp_path / "replay"))
    assert same(zero.kept.load(TASKS[2]), replay.kept.load(TASKS[2]))
    assert same(zero.classifiers.load(TASKS[2]), replay.classifiers.load(TASKS[2]))


@pytest.mark.parametrize("at", ["estimate", "state"])
def test_the_classifier_finds_guided_images_more_typical_of_their_class(at, begun, draw):
    strategy = with_options(begun)
    classifier = strategy._classifier(TASKS[0], TASKS[0]).eval()
    plain, guided = (
        draw(guidance_scale=0, images_per_class=20),
        draw(guided_at=at, guidance_scale=2, images_per_class=20),
    )
    assert list(guided) == list(TASKS[0].class_ids)
    for row, class_id in enumerate(TASKS[0].class_ids):
        with torch.no_grad():
            before, after = (
                log_probability(classifier, row, to_model_range(images[class_id])) for images in (plain, guided)
            )
        assert after.mean() > before.mean()
        assert (after > -0.6931).sum() >= (before > -0.6931).sum()  # likelier than the other of two classes


def test_the_weight_s_limit_and_the_place_change_the_images(draw):
    reference = draw(guidance_scale=2)
    assert not same(draw(guidance_scale=2, largest_weight=0.1), reference)
    assert not same(draw(guidance_scale=2, guided_at="state"), reference)


def test_the_classifier_is_not_changed(begun, draw, monkeypatch):
    """Neither its weights nor the running means of batch normalization, and it gets no gradients."""
    used, build = [], type(with_options(begun))._classifier
    monkeypatch.setattr(type(with_options(begun)), "_classifier", lambda *args: used.append(build(*args)) or used[-1])
    draw()
    (classifier,) = used
    assert same(dict(classifier.state_dict()), with_options(begun).classifiers.load(TASKS[0]))
    assert not any(module.training for module in classifier.modules())
    assert all(weight.grad is None and not weight.requires_grad for weight in classifier.parameters())


def test_images_that_were_drawn_before_a_stop_are_read(begun, draw, monkeypatch):
    expected = draw(guidance_scale=0)
    monkeypatch.setattr(generated_images, "draw_samples", None)
    strategy = with_options(begun)
    strategy.begin_task(TASKS[1])
    assert same(strategy._generated, expected)


def test_a_base_without_images_is_refused(tmp_path):
    strategy = make_strategy("ddgr", tmp_path)
    object.__setattr__(strategy.setting, "num_images", {5: 0, 0: 4, 7: 6, 3: 2})
    with pytest.raises(ValueError, match=r"'ddgr' guides .* none of the classes \[5, 1\] of `base_model`"):
        strategy.check()


def test_a_backward_pass_counts_as_an_evaluation(tmp_path):
    counts = [
        make_strategy(name, tmp_path, strategy_options={**OPTIONS[name], **options}).replay_evaluations(TASKS[1])
        for name, options in (("replay", {}), ("ddgr", {}), ("ddgr", {"guided_at": "state"}))
    ]
    # Ten images, two steps of Heun.
    assert counts == [40, 80, 40]
