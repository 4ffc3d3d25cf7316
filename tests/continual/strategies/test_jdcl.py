"""JDCL: its losses written out, its limits, which are other strategies, its teachers, and restarts between its phases."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import digests, short_run
from strategies import OPTIONS, TASKS, Drawn, learn, make_strategy

from funlora_hf.classifier import percentage, predict
from funlora_hf.continual.strategies.generated_images import GeneratedImages
from funlora_hf.continual.strategies.jdcl import agreeing
from funlora_hf.continual.strategy import Batch
from funlora_hf.flow_matching import interpolate


DRAWING = {"num_inference_steps": 1, "images_per_class": 3}
# Without clipping, whose norm would also count the head.
TWO = {"tasks": TASKS[:2], "max_grad_norm": None, "base_train_steps": 3, "adapter_train_steps": 2}
# A global phase as it is in `replay`.
AS_REPLAY = {
    "classification_weight": 0.0,
    "simple_weight": 1.0,
    "distillation_weight": 0.0,
    "global_classification_weight": 0.0,
    "classification_distillation_weight": 0.0,
    "new_images": "real",
}


def stopped(strategy, phase):
    """Run a strategy until it would build a phase."""
    build = strategy.build

    def stop(one):
        if one.name == phase:
            raise KeyboardInterrupt
        return build(one)

    strategy.build = stop
    with pytest.raises(KeyboardInterrupt):
        learn(strategy)
    strategy.build = build
    return strategy


@pytest.fixture(scope="module")
def after_local(tmp_path_factory):
    """A run before its first global phase; not to be changed."""
    folder = tmp_path_factory.mktemp("after_local")
    return stopped(make_strategy("jdcl", folder, strategy_options=DRAWING, **TWO), "task_2").setting.output_dir


@pytest.fixture
def global_phase(after_local):
    """A strategy with these options at the start of its first global phase: itself, the phase and what it trains."""
    built = []

    def begin(**options):
        strategy = make_strategy("jdcl", after_local, strategy_options={**DRAWING, **options}, **TWO)
        phase = strategy.phases(TASKS[1])[1]
        torch.manual_seed(0)
        built.append((strategy, phase, strategy.build(phase)))
        return built[-1]

    yield begin
    for strategy, phase, trainable in built:
        strategy.release_phase(phase, trainable)
        strategy.images.delete()


def some_batch(*class_ids, number=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample, noise = torch.randn(2, len(class_ids), 1, 8, 8, generator=generator)
    return Batch(sample, torch.tensor(class_ids), noise, torch.rand(len(class_ids), generator=generator), number)


def velocities(net, batch, rows):
    noisy = interpolate(batch.sample, batch.noise, batch.sigma)
    return net.unet(noisy, 1000 * batch.sigma, torch.tensor(rows)).sample


def cross_entropy(targets, logits):
    """Of probabilities `(batch, classes)`, in float64."""
    logits = logits.detach().double().numpy()
    return -(targets * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))).sum(axis=1)


def test_without_its_weight_the_classifier_leaves_the_base_as_it_is_to_the_bit(tmp_path):
    for name, options in (("finetune", None), ("jdcl", {"classification_weight": 0.0})):
        learn(
            make_strategy(
                name,
                tmp_path / name,
                tasks=TASKS[:1],
                strategy_options=options,
                base_train_steps=3,
                max_grad_norm=None,
            )
        )
    assert digests(tmp_path / "jdcl" / "base") == digests(tmp_path / "finetune" / "base")


def test_without_classifier_and_teachers_its_generator_is_replay_s_to_the_bit(tmp_path):
    for name, options in (("replay", OPTIONS["replay"]), ("jdcl", AS_REPLAY)):
        options = {**options, **DRAWING}
        learn(make_strategy(name, tmp_path / name, strategy_options=options, **TWO))
    assert digests(tmp_path / "jdcl/model") == digests(tmp_path / "replay/model")


def test_the_loss_of_a_local_phase_is_its_formula(after_local):
    strategy = make_strategy("jdcl", after_local, strategy_options={**DRAWING, "classification_weight": 0.3}, **TWO)
    phase = strategy.phases(TASKS[1])[0]
    net, batch = strategy.build(phase).module.eval(), some_batch(7, 0)
    losses = strategy.training_step(phase, batch, net)
    generation = (velocities(net, batch, [3, 2]) - (batch.noise - batch.sample)).square().mean(dim=(1, 2, 3))
    classification = cross_entropy(np.eye(4)[[3, 2]], net.classify(batch.sample))
    np.testing.assert_allclose(losses.detach(), generation.detach() + 0.3 * classification, rtol=1e-5)


@pytest.mark.parametrize("number", [2, 3])
def test_the_loss_of_a_global_phase_is_its_formula(number, global_phase):
    """Class 1 is of the first task, class 7 a new one. Classification begins after 0.3 * 8 batches."""
    weights = {
        "simple_weight": 0.5,
        "distillation_weight": 0.7,
        "global_classification_weight": 0.2,
        "classification_distillation_weight": 0.4,
    }
    strategy, phase, trainable = global_phase(wait=0.3, **weights)
    net, batch = trainable.module.eval(), some_batch(1, 7, number=number)
    losses = strategy.training_step(phase, batch, net).detach().numpy()
    old, local = strategy._teachers
    velocity, taught = (
        velocities(net, batch, [1, 3]),
        torch.cat([velocities(old, batch, [1, 1])[:1], velocities(local, batch, [1, 3])[1:]]),
    )
    generation = (velocity - (batch.noise - batch.sample)).square().mean(dim=(1, 2, 3)).detach().numpy()
    distillation = (velocity - taught).square().mean(dim=(1, 2, 3)).detach().numpy()
    logits = net.classify(batch.sample)
    soft = np.zeros((2, 4))
    soft[0, :2] = old.classify(batch.sample)[0].double().softmax(dim=0)
    soft[1] = local.classify(batch.sample)[1].double().softmax(dim=0)
    expected = 0.5 * generation + 2 * 0.7 * distillation
    if number == 3:
        expected += 0.2 * cross_entropy(np.eye(4)[[1, 3]], logits) + 2 * 0.4 * cross_entropy(soft, logits)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_what_equals_its_teacher_learns_nothing_from_it(global_phase):
    """A global phase starts from the network before the task, which teaches the past classes."""
    strategy, phase, trainable = global_phase(simple_weight=0.0)
    net = trainable.module.eval()
    losses = strategy.training_step(phase, some_batch(5, 1, 1), net)
    assert torch.equal(losses, torch.zeros(3))
    losses.sum().backward()
    assert not any(parameter.grad.any() for parameter in net.parameters() if parameter.grad is not None)


def test_the_gradient_of_distillation_is_written_out(global_phase):
    strategy, phase, trainable = global_phase(simple_weight=0.0)
    net, batch = trainable.module.eval(), some_batch(7, 0)
    seen = []
    net.unet.register_forward_hook(lambda _, inputs, output: seen.append(output[0]))
    losses = strategy.training_step(phase, batch, net)
    seen[0].retain_grad()
    losses.mean().backward()
    difference = seen[0] - velocities(strategy._teachers[1], batch, [3, 2])
    torch.testing.assert_close(seen[0].grad, 4 / difference.numel() * difference.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_teachers_give_probabilities_of_the_classes_that_they_know(dtype, global_phase):
    strategy, _, _ = global_phase()
    # Logits of a size that half precision rounds off or overflows when it exponentiates them.
    for teacher in strategy._teachers:
        teacher.head.register_forward_hook(lambda _, inputs, output: (1e3 * output).to(dtype))
    batch, rows = some_batch(5, 0, 1, 7), torch.tensor([0, 2, 1, 3])
    _, probabilities = strategy._taught(TASKS[1], rows, (batch.sample, 1000 * batch.sigma, rows, batch.sample))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4))
    assert not probabilities[[0, 2], 2:].any()
    assert torch.nn.functional.cross_entropy(torch.randn(4, 4), probabilities).isfinite()


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_teachers_stay_as_they_are_and_are_freed(ends, after_local, tmp_path):
    folder = shutil.copytree(after_local, tmp_path / "run")
    strategy = make_strategy("jdcl", folder, strategy_options=DRAWING, resume_from_checkpoint="latest", **TWO)
    build, after_step, kept, local = strategy.build, strategy.after_step, [], []

    def built(phase):
        trainable = build(phase)
        kept.extend(
            ({**t.state_dict()}, {k: v.clone() for k, v in t.state_dict().items()}) for t in strategy._teachers
        )
        local.append(weakref.ref(strategy._teachers[1]))
        return trainable

    def step(phase):
        after_step(phase)
        if ends == "in an error":
            raise ArithmeticError

    strategy.build, strategy.after_step = built, step
    if ends == "well":
        learn(strategy)
    else:
        with pytest.raises(ArithmeticError):
            learn(strategy)
    assert len(kept) == 2
    assert all(torch.equal(now[name], then[name]) for now, then in kept for name in then)
    assert (strategy._teachers, strategy._drawn, local[0]()) == ((), {}, None)


def test_it_reads_no_real_image_in_a_global_phase(global_phase):
    strategy, phase, _ = global_phase()
    real = some_batch(*[0, 7] * 20)
    mixed = []
    for given in (real, replace(real, sample=torch.rand(40, 1, 8, 8))):
        torch.manual_seed(3)
        mixed.append(strategy.make_batch(phase, given))
    one, other = mixed
    assert torch.equal(one.sample, other.sample)
    assert torch.equal(one.class_ids, other.class_ids)
    assert set(one.class_ids.tolist()) == {5, 1, 0, 7}


def test_images_are_drawn_by_the_teacher_that_knows_the_class(global_phase, monkeypatch):
    strategy, _, _ = global_phase()
    made = []
    monkeypatch.setattr(GeneratedImages, "draw", lambda images, *asked: made.append(asked) or {})
    strategy._draw(TASKS[1])
    old, local = strategy._teachers
    assert [(pipe.unet, counts, purpose) for pipe, counts, purpose in made] == [
        (old.unet, {5: 3, 1: 3}, "replay_2"),
        (local.unet, {0: 3, 7: 3}, "local_2"),
    ]
    assert [list(pipe.classes) for pipe, _, _ in made] == [[5, 1], [5, 1, 0, 7]]


def test_images_on_whose_class_the_teacher_agrees_are_kept(global_phase):
    strategy, _, _ = global_phase()
    teacher = strategy._teachers[1]
    # The mean grey of an image is its logit of row 1; the other is 0.
    teacher.classify = lambda images: torch.stack([torch.zeros(len(images)), images.mean(dim=(1, 2, 3))], dim=1)
    grey = torch.tensor([130, 100, 250, 10, 90, 20, 30, 40, 50, 60, 70], dtype=torch.uint8)
    images = grey[:, None, None, None].expand(-1, 1, 8, 8)
    kept = [
        agreeing(teacher, given, 1, 4)[:, 0, 0, 0].tolist() for given in (images, images[images[:, 0, 0, 0] < 128])
    ]
    # Of nine images with no agreement, one, the likeliest.
    assert kept == [[130, 250], [100]]


@pytest.mark.parametrize("moment", ["after the local phase", "after drawing", "inside the global phase"])
def test_a_restart_between_its_steps_changes_nothing(moment, after_local, tmp_path):
    expected = finished(shutil.copytree(after_local, tmp_path / "whole"))
    folder = shutil.copytree(after_local, tmp_path / "stopped")
    if moment != "after the local phase":
        strategy = make_strategy(
            "jdcl", folder, strategy_options=DRAWING, checkpointing_steps=2, resume_from_checkpoint="latest", **TWO
        )
        hook = "make_batch" if moment == "after drawing" else "after_step"
        original, calls = getattr(strategy, hook), []

        def stop(*arguments):
            result = original(*arguments)
            calls.append(result)
            if len(calls) == (1 if moment == "after drawing" else 3):
                raise KeyboardInterrupt
            return result

        setattr(strategy, hook, stop)
        with pytest.raises(KeyboardInterrupt):
            learn(strategy)
        assert len(list((folder / "checkpoints/replay").iterdir())) == 4
    assert finished(folder) == expected


def finished(folder):
    strategy = make_strategy("jdcl", folder, strategy_options=DRAWING, resume_from_checkpoint="latest", **TWO)
    strategy.build, built = (lambda build: lambda phase: built.append(phase.name) or build(phase))(strategy.build), []
    learn(strategy)
    assert built == ["task_2"]
    assert not (folder / "checkpoints/local").exists()
    return {part: digests(folder / part) for part in ("model", "checkpoints/classifier", "checkpoints/generator")}


def test_the_classifier_learns_to_classify(tmp_path):
    """With a large weight it is an ordinary classifier: classes that differ in their level of grey are told apart."""
    options = {"classification_weight": 1.0, "head_hidden": 32}
    training = {"base_train_steps": 60, "base_learning_rate": 1e-2, "base_batch_size": 8, "base_warmup_steps": 1}
    tasks = (replace(TASKS[0], class_ids=(5, 1, 7)),)
    strategy = learn(make_strategy("jdcl", tmp_path, tasks=tasks, strategy_options=options, **training))
    data = Drawn(20)
    images, labels = torch.cat([data.images(c) for c in (5, 1, 7)]), torch.tensor([0, 1, 2]).repeat_interleave(20)
    assert percentage(predict(strategy.own_classifier(), images) == labels) == 100


def test_steps_of_its_phases(tmp_path):
    """A local phase sees each new class as often as an adapter does, a global one every class, as in `replay`."""
    strategy = make_strategy("jdcl", tmp_path)
    steps = {p.name: p.settings.train_steps for task in TASKS for p in strategy.phases(task)}
    assert steps == {"base": 6, "local_2": 4 * 2, "task_2": 4 * 4, "local_3": 4, "task_3": 4 * 5}
    given = make_strategy("jdcl", tmp_path, strategy_options={"local_train_steps": 9})
    assert [given.phases(task)[0].settings.train_steps for task in TASKS[1:]] == [18, 9]
    epochs = make_strategy("jdcl", tmp_path, adapter_train_steps=None, adapter_epochs=2)
    assert [[p.settings.epochs for p in epochs.phases(task)] for task in TASKS[1:]] == [[2, 4], [2, 10]]
    # Five images of each class, as many are drawn; two steps of heun are four evaluations.
    assert [strategy.replay_evaluations(task) for task in TASKS] == [0, 4 * 5 * 4, 5 * 5 * 4]


def test_a_given_base_is_refused_by_name():
    with pytest.raises(
        ValueError, match="`strategy` 'jdcl' trains a base of its own, so it cannot add classes to `base_model` 'mine'"
    ):
        short_run(strategy="jdcl", base_model="mine", unet_config=None)
