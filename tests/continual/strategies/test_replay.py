"""Replay and guided replay: what is mixed, what is drawn, how steps grow, and the classifier that goes along."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import OPTIONS, TASKS, Drawn, learn, make_strategy, stop_at
from torch import nn

from funlora_hf import FunLoraPipeline
from funlora_hf.continual.strategies.generated_images import GeneratedImages, ReplayOptions, joined, mix, share_of
from funlora_hf.continual.strategies.guide import likeliest
from funlora_hf.continual.strategies.replay import is_classifier
from funlora_hf.continual.strategy import Batch, velocity_losses
from funlora_hf.data.pixels import to_model_range
from funlora_hf.sampling.drawing import draw_samples, to_uint8
from funlora_hf.sampling.guidance import Guidance


def real_batch(size=4000):
    """Real images, all of value 0, of the classes 7 and 8."""
    sample = torch.zeros(size, 1, 2, 2)
    return Batch(sample, torch.tensor([7, 8]).repeat(size // 2), torch.randn(size, 1, 2, 2), torch.rand(size), 3)


def generated_images():
    """Two of class 0, four of each of 1 and 2: the value says which image it is."""
    sizes = {0: 2, 1: 4, 2: 4}
    return {
        c: (10 * (c + 1) + torch.arange(n)).to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2)
        for c, n in sizes.items()
    }


def test_labels_are_uniform_over_all_classes_and_images_over_each():
    real, generated = real_batch(), generated_images()
    torch.manual_seed(0)
    mixed = mix(real, generated, num_new=2)
    counts = np.bincount(mixed.class_ids.numpy(), minlength=9)
    # Five classes: 800 each, with a deviation of 25.
    np.testing.assert_allclose(counts[[0, 1, 2, 7, 8]], 800, atol=125)
    values = (mixed.sample[:, 0, 0, 0].double() + 1) * 127.5
    for class_id, images in generated.items():
        shown = values[mixed.class_ids == class_id].round()
        per_image = np.bincount(shown.int().numpy())[images[:, 0, 0, 0].int().numpy()]
        assert per_image.sum() == len(shown)
        np.testing.assert_allclose(per_image, len(shown) / len(images), rtol=0.3)
    assert (mixed.sample[mixed.class_ids >= 7] == 0).all()
    assert mixed.number == 3
    assert torch.equal(mixed.noise, real.noise)


def test_the_first_task_mixes_nothing():
    real = real_batch(4)
    assert mix(real, {}, num_new=2) is real


@pytest.mark.parametrize("count", [1, 4, 9, 10])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_shares_add_up(count, parts):
    shares = [share_of({5: count}, part, parts)[5] for part in range(parts)]
    assert sum(shares) == max(count, parts) or (count < parts and min(shares) == 1)
    assert max(shares) - min(shares) <= 1
    images = [{5: torch.zeros(share, 1, 1, 1)} for share in shares]
    assert len(joined(images)[5]) == sum(shares)


def test_images_are_drawn_once_and_are_the_pipeline_s(tiny_pipe, tmp_path, monkeypatch):
    options = ReplayOptions(num_inference_steps=2, sampling_batch_size=2)
    images = GeneratedImages(tmp_path / "replay", options, seed=4).draw(tiny_pipe, {3: 3, 5: 2}, "replay_2")
    for class_id, count in ((3, 3), (5, 2)):
        expected = draw_samples(
            tiny_pipe, class_id, count, purpose="replay_2", seed=4, batch_size=2, solver="heun", num_inference_steps=2
        )
        assert torch.equal(images[class_id], to_uint8(expected.images))
    again = GeneratedImages(tmp_path / "replay", options, seed=4)
    monkeypatch.setattr(type(tiny_pipe), "__call__", None)
    assert torch.equal(again.draw(tiny_pipe, {3: 3}, "replay_2")[3], images[3])
    again.delete()
    assert not (tmp_path / "replay").exists()


def test_guidance_of_scale_zero_replays_the_same_to_the_bit(tiny_pipe, tmp_path):
    options = ReplayOptions(num_inference_steps=2)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    draws = []
    for name, guidance in (
        ("plain", None),
        ("zero", Guidance(lambda images: likeliest(classifier, images, torch.tensor([2, 3])), 0.0)),
        ("some", Guidance(lambda images: likeliest(classifier, images, torch.tensor([2, 3])), 50.0)),
    ):
        draws.append(
            GeneratedImages(tmp_path / name, options, seed=0).draw(tiny_pipe, {3: 4}, "p", guidance=guidance)[3]
        )
    plain, zero, some = draws
    assert torch.equal(zero, plain)
    scores = [likeliest(classifier, to_model_range(images), torch.tensor([2, 3])).mean() for images in (plain, some)]
    assert scores[1] > scores[0]


def test_the_likeliest_new_class_is_chosen_for_each_image():
    logits = torch.tensor([[5.0, 1.0, 2.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    found = likeliest(lambda images: logits, torch.zeros(2, 1, 1, 1), torch.tensor([1, 2]))
    expected = [math.log(math.exp(2) / (math.exp(5) + math.exp(1) + math.exp(2)))]
    expected.append(math.log(math.exp(3) / (1 + math.exp(3) + math.exp(1))))
    np.testing.assert_allclose(found.numpy(), expected)


@pytest.mark.parametrize("name", ["replay", "guide"])
def test_steps_and_images_grow_with_the_tasks(name, tmp_path):
    """Each class seen is met as often in every task, and as many images are drawn of each past one."""
    strategy = make_strategy(name, tmp_path)
    phases = [[phase for phase in strategy.phases(task) if not is_classifier(phase)] for task in TASKS]
    assert [phase.settings.train_steps for (phase,) in phases[1:]] == [4 * 4, 4 * 5]
    assert [strategy.past(task) for task in TASKS] == [{}, {5: 5, 1: 5}, {5: 5, 1: 5, 0: 5, 7: 5}]
    classifiers = [phase for task in TASKS for phase in strategy.phases(task) if is_classifier(phase)]
    assert [phase.settings.train_steps for phase in classifiers] == [6, 12, 15]
    given = make_strategy(name, tmp_path, strategy_options={"images_per_class": 3})
    assert set(given.past(TASKS[2]).values()) == {3}
    epochs = make_strategy(name, tmp_path, adapter_train_steps=None, adapter_epochs=2)
    # Task 2: two of four classes are new, so an epoch over their images is half of one over all.
    assert [epochs.phase_settings(task).epochs for task in TASKS[1:]] == [4, 10]


def test_replayed_images_come_from_the_previous_generator(tmp_path):
    strategy = make_strategy("replay", tmp_path)
    drawn = {}
    begin_task = strategy.begin_task

    def begin(task):
        begin_task(task)
        drawn[task.index] = (strategy._generated, strategy.before(task))
        if task.index:
            with strategy.inference([5]) as pipe:
                sample = draw_samples(
                    pipe,
                    5,
                    5,
                    purpose=f"replay_{task.index + 1}",
                    seed=0,
                    batch_size=250,
                    solver="heun",
                    num_inference_steps=2,
                )
            assert torch.equal(strategy._generated[5], to_uint8(sample.images))

    strategy.begin_task = begin
    learn(strategy)
    assert list(drawn[1][0]) == [5, 1]
    assert list(drawn[2][0]) == [5, 1, 0, 7]
    assert drawn[1][1] is None
    assert drawn[2][1] == TASKS[1]


@pytest.fixture
def distilling(tmp_path):
    """A strategy in task 2 with the weight 3, whose base is trained; a batch of past and new classes; and what builds the phase."""
    strategy = make_strategy("replay", tmp_path, strategy_options={**OPTIONS["replay"], "distillation": 3.0})
    stop_at(strategy, "task_2", 1)
    with pytest.raises(KeyboardInterrupt):
        learn(strategy)
    phase = strategy.phases(TASKS[1])[0]
    torch.manual_seed(0)
    sample, noise = torch.randn(2, 4, 1, 8, 8)
    return strategy, phase, Batch(sample, torch.tensor([0, 5, 7, 1]), noise, torch.rand(4))


def without_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def test_distillation_is_zero_at_the_start_and_leaves_new_classes_their_loss(distilling):
    strategy, phase, batch = distilling
    trainable = strategy.build(phase)
    assert trainable.module.training
    without_dropout(trainable.module)
    losses = strategy.training_step(phase, batch, trainable.module)
    data = velocity_losses(trainable.module, batch, torch.tensor([2, 0, 3, 1]))
    assert (losses[[1, 3]] == 0).all()
    assert torch.equal(losses[[0, 2]], data[[0, 2]])
    strategy.release_phase(phase, trainable)
    assert torch.equal(strategy.training_step(phase, batch, trainable.module), data)


def test_distillation_is_the_distance_to_the_previous_generator_s_velocity(distilling):
    strategy, phase, batch = distilling
    trainable = strategy.build(phase)
    without_dropout(trainable.module)
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            parameter += 0.01 * torch.randn_like(parameter)
    losses = strategy.training_step(phase, batch, trainable.module)
    losses.sum().backward()
    assert strategy._teacher is strategy.sampler(None).unet
    assert all(parameter.grad is None for parameter in strategy._teacher.parameters())
    sigma = batch.sigma[:, None, None, None]
    noisy = (1 - sigma) * batch.sample + sigma * batch.noise
    for place, row in ((1, 0), (3, 1)):
        one = noisy[[place]], 1000 * batch.sigma[[place]], torch.tensor([row])
        with torch.no_grad():
            distance = (
                trainable.module(*one).sample
                - FunLoraPipeline.from_pretrained(strategy.setting.base_dir).unet(*one).sample
            )
        np.testing.assert_allclose(losses[place].item(), 3.0 * distance.square().mean().item(), rtol=1e-4)
    assert (
        strategy.memory_report()["transient"]
        > make_strategy("replay", strategy.setting.output_dir).memory_report()["transient"]
    )


def test_a_restart_with_distillation_changes_nothing(distilling, learned, tmp_path_factory):
    strategy, *_ = distilling
    options = {"strategy_options": strategy.setting.training.strategy_options}
    resumed = learn(make_strategy("replay", strategy.setting.output_dir, resume_from_checkpoint="latest", **options))
    whole = learn(make_strategy("replay", tmp_path_factory.mktemp("whole"), **options))
    first, second, third = (one.kept.load(TASKS[2]) for one in (resumed, whole, learned[0]))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Both strategies behind their last task; not to be changed."""
    return [learn(make_strategy(name, tmp_path_factory.mktemp(name))) for name in ("replay", "guide")]


def test_guide_s_generator_is_replay_s_and_its_classifier_is_not(learned):
    replay, guide = learned
    for task in TASKS[2:]:
        first, second = (strategy.kept.load(task) for strategy in (replay, guide))
        assert all(torch.equal(first[key], second[key]) for key in first)
        first, second = (strategy.classifiers.load(task) for strategy in (replay, guide))
        assert any(not torch.equal(first[key], second[key]) for key in first)
    classifier = guide.own_classifier()
    assert classifier(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert not classifier.training


def test_a_classifier_goes_on_with_the_weights_that_it_had(learned):
    """The head of fewer classes is the first rows of the larger one, whose other rows are fresh."""
    strategy, _ = learned
    kept = strategy.classifiers.load(TASKS[2])
    same = strategy._classifier(TASKS[2], TASKS[2]).state_dict()
    assert all(torch.equal(same[key], kept[key]) for key in kept)
    smaller = {key: t[:4] if t.dim() and len(t) == 5 else t for key, t in kept.items()}
    strategy.classifiers.save(TASKS[1], smaller)
    grown = strategy._classifier(TASKS[2], TASKS[1]).state_dict()
    strategy.classifiers.path(TASKS[1]).unlink()
    for key, tensor in grown.items():
        rows = len(smaller[key]) if tensor.dim() else None
        assert torch.equal(tensor[:rows] if tensor.dim() else tensor, smaller[key]), key
    head = [key for key in kept if kept[key].dim() and len(kept[key]) == 5]
    assert len(head) == 2
    assert not any(torch.equal(grown[key][4:], kept[key][4:]) for key in head)


@pytest.mark.parametrize("architecture", ["cnn", "resnet18"])
@pytest.mark.parametrize("classes", [5, 64])
def test_the_head_is_counted_whatever_the_number_of_classes(architecture, classes, learned, monkeypatch):
    """64 is also a width of both networks."""
    strategy, _ = learned
    monkeypatch.setattr(strategy, "options", replace(strategy.options, classifier_architecture=architecture))
    monkeypatch.setattr(type(strategy.setting), "seen", lambda setting, task: tuple(range(classes)))
    head = [module for module in strategy._untrained(classes).modules() if isinstance(module, nn.Linear)][-1]
    assert strategy._head_bytes(TASKS[0]) == head.weight.nbytes + head.bias.nbytes


def test_running_means_of_the_classifier_are_part_of_a_phase(learned):
    """Without them a restart could not go on as before."""
    strategy, _ = learned
    (phase,) = [phase for phase in strategy.phases(TASKS[0]) if is_classifier(phase)]
    assert any("running_mean" in name for name in strategy.build(phase).buffers)


def test_a_base_without_real_images_has_no_classifier_of_its_own(tmp_path):
    strategy = make_strategy("replay", tmp_path)
    object.__setattr__(strategy.setting, "num_images", {0: 4, 7: 6, 3: 2})
    object.__setattr__(strategy.setting, "has_base", True)
    assert strategy.phases(TASKS[0]) == []
    assert [is_classifier(phase) for phase in strategy.phases(TASKS[1])] == [False, True]
    # As many as a new class has at most, since the base's own number is not known.
    assert strategy.past(TASKS[1]) == {5: 6, 1: 6}
    assert Drawn().per_class == 5
