"""DiffClass: a LoRA that is `naive_lora`'s of a single task, a classifier that is `replay`'s, and what the domain head does to it."""

from __future__ import annotations

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from strategies import OPTIONS, TASKS, Drawing, Drawn, drawn_from, learn, make_strategy
from torch import nn
from torch.nn import functional

from funlora_hf import FunLoraPipeline
from funlora_hf.classifier import build_classifier
from funlora_hf.continual.batches import RealImages
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategies.domain_adversarial import DomainAdversarial, ReversedGradient, strength_at
from funlora_hf.continual.strategies.lora_per_task import likeliest_of
from funlora_hf.continual.strategy import Batch
from funlora_hf.continual.strategy_state import memory_reports
from funlora_hf.continual.trainer import ContinualTrainer
from funlora_hf.data.pixels import to_model_range


VECTOR = "base_model.model.class_embedding.token_adapter.trainable_tokens_delta"
PLAIN = {"matching_share": 0.0, "synthetic_share": 0.0, "domain_weight": 0.0}


def with_options(folder, **options):
    return make_strategy("diffclass", folder, strategy_options={**OPTIONS["diffclass"], **options})


def tensors(strategy, class_id):
    return load_file(strategy.adapters_dir / f"class_{class_id}" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A finished run, and what it drew after each task; not to be changed."""
    strategy = with_options(tmp_path_factory.mktemp("diffclass"))
    drawing = Drawing(strategy)
    return learn(strategy, evaluator=drawing), drawing.drawn


@pytest.fixture
def on_base(learned, tmp_path):
    """Makes a strategy with these options in a folder with the base only."""
    shutil.copytree(learned[0].setting.base_dir, tmp_path / "base")
    return lambda **options: with_options(tmp_path, **options)


def some_batch(*class_ids, number=0):
    generator = torch.Generator().manual_seed(0)
    sample, noise = torch.randn(2, len(class_ids), 1, 8, 8, generator=generator)
    return Batch(sample, torch.tensor(class_ids), noise, torch.rand(len(class_ids), generator=generator), number)


def grey(level, count=4):
    return torch.full((count, 1, 8, 8), level, dtype=torch.uint8)


def test_without_drawn_images_a_lora_is_naive_lora_s_from_a_fresh_start_to_the_bit(learned, tmp_path):
    run = learn(with_options(tmp_path / "diffclass", **PLAIN))
    for task in TASKS[1:]:
        folder = tmp_path / f"naive_{task.index}"
        shutil.copytree(learned[0].setting.base_dir, folder / "base")
        naive = make_strategy("naive_lora", folder)
        batches = RealImages(Drawn(), naive.setting.training, torch.device("cpu"))
        accelerator = Accelerator(cpu=True)
        ContinualTrainer(naive, batches, folder=RunFolder(folder), accelerator=accelerator).learn_beside(task)
        kept, pipe = naive.kept.load(task), FunLoraPipeline.from_pretrained(run.setting.base_dir)
        for class_id in task.class_ids:
            pipe.load_adapter(run.adapters_dir / f"class_{class_id}", class_label=class_id)
            saved = {key.split(".", 2)[2]: t for key, t in tensors(run, class_id).items()}
            vector = saved.pop("class_embedding.token_adapter.trainable_tokens_delta")
            row = naive.setting.seen(task).index(class_id)
            assert torch.equal(vector[0], kept["class_embedding.weight"][row])
            assert len(saved) == len(kept) - 1
            for key, tensor in saved.items():
                layer, _, which = key.removesuffix(".weight").rpartition(".lora_")
                assert torch.equal(tensor, kept[f"{layer}/{which}"]), key


def test_a_lora_starts_at_the_base(on_base):
    """Base classes are drawn as by the base, new ones with the mean of its vectors."""
    strategy = on_base()
    phase = strategy.phases(TASKS[1])[0]
    trainable = strategy.build(phase)
    base = FunLoraPipeline.from_pretrained(strategy.setting.base_dir).unet
    noisy, times = torch.randn(4, 1, 8, 8), torch.full((4,), 500.0)
    with torch.no_grad():
        found = trainable.module.eval()(noisy, times, torch.tensor([0, 1, 2, 3])).sample
        assert torch.equal(found[:2], base(noisy, times, torch.tensor([0, 1, 0, 0])).sample[:2])
        base.class_embedding.weight[0] = base.class_embedding.weight.mean(dim=0)
        assert torch.equal(found[2:], base(noisy, times, torch.zeros(4, dtype=torch.long)).sample[2:])


def test_past_classes_keep_their_vectors_while_a_lora_learns_from_their_images(learned):
    strategy = with_options(learned[0].setting.output_dir)
    phase = strategy.phases(TASKS[2])[0]
    trainable = strategy.build(phase)
    vectors = trainable.parameters["class_embedding.weight"]
    for row, class_id in ((2, 0), (3, 7)):
        assert torch.equal(vectors[row], tensors(strategy, class_id)[VECTOR][0])
    strategy.training_step(phase, some_batch(5, 0, 7, 3), trainable.module).sum().backward()
    assert [bool(row.any()) for row in vectors.grad] == [False, False, False, False, True]
    without = {name for name, parameter in trainable.parameters.items() if parameter.grad is None}
    assert not without


def test_a_share_of_a_lora_s_batch_is_drawn_images_of_past_classes(on_base):
    strategy = on_base(matching_share=0.3)
    phase = strategy.phases(TASKS[1])[0]
    strategy._generated = {5: grey(50), 1: grey(10)}
    torch.manual_seed(0)
    mixed = strategy.make_batch(phase, some_batch(*[0, 7] * 500))
    is_past = torch.isin(mixed.class_ids, torch.tensor([5, 1]))
    assert torch.equal(mixed.drawn, is_past)
    assert abs(is_past.double().mean() - 0.3) < 0.05
    for class_id, level in ((5, 50), (1, 10)):
        assert (mixed.sample[mixed.class_ids == class_id] == to_model_range(grey(level))[:1]).all()
        assert abs((mixed.class_ids == class_id).double().mean() - 0.15) < 0.05


def test_samples_of_a_class_never_change(learned):
    _, after = learned
    for earlier, later in itertools.pairwise(after):
        assert all(torch.equal(images, later[class_id]) for class_id, images in earlier.items())
    assert not torch.equal(after[2][0], after[2][7])


def test_its_files_are_adapters_that_any_pipeline_loads(learned):
    strategy, after = learned
    pipe = FunLoraPipeline.from_pretrained(strategy.setting.base_dir)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_adapter(strategy.adapters_dir / "class_7", class_label=7)
    assert torch.equal(drawn_from(pipe, 7), after[2][7])


def test_without_its_additions_the_classifier_learns_as_in_replay_to_the_bit(on_base):
    found = []
    for name, options in (("replay", {}), ("diffclass", PLAIN)):
        folder = on_base().setting.output_dir
        strategy = make_strategy(name, folder, strategy_options={**OPTIONS[name], **options})
        phase = strategy.phases(TASKS[1])[1]
        torch.manual_seed(0)
        trainable = strategy.build(phase)
        strategy._generated = {5: Drawn().images(5), 1: Drawn().images(1)}
        losses = strategy.training_step(phase, strategy.make_batch(phase, some_batch(*[0, 7] * 9)), trainable.module)
        losses.sum().backward()
        found.append((phase, losses, *(p.grad for p in trainable.parameters.values())))
    (one, *expected), (other, *same) = found
    assert one == other
    assert all(torch.equal(a, b) for a, b in zip(expected, same, strict=True))


def test_the_reversed_gradient_is_the_identity_forwards_and_minus_its_strength_backwards():
    weight = torch.randn(3, 2)
    gradients = []
    for strength in (None, 0.0, 0.7):
        features = torch.ones(5, 3, requires_grad=True)
        passed = features if strength is None else ReversedGradient.apply(features, strength)
        assert torch.equal(passed, features)
        functional.cross_entropy(passed @ weight, torch.zeros(5, dtype=torch.long)).backward()
        gradients.append(features.grad)
    assert not gradients[1].any()
    torch.testing.assert_close(gradients[2], -0.7 * gradients[0])


@pytest.mark.parametrize("architecture", ["cnn", "resnet18"])
def test_the_domain_head_learns_what_the_features_unlearn(architecture):
    torch.manual_seed(0)
    classifier = build_classifier(3, channels=1, image_size=8, architecture=architecture).eval()
    images, domains = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    expected = classifier(images)
    net = DomainAdversarial(classifier)
    ordinary = {}
    for strength in (-1.0, 0.5):  # without reversal, and with
        net.zero_grad()
        logits, found = net(images, strength)
        assert torch.equal(logits, expected)
        assert found.shape == (4, 2)
        functional.cross_entropy(found, domains).backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        ordinary = ordinary or gradients
    head = [name for name in gradients if name.startswith("domain.")]
    assert len(head) == 2
    assert all(torch.equal(gradients[name], ordinary[name]) for name in head)
    for name in gradients.keys() - head:
        torch.testing.assert_close(gradients[name], -0.5 * ordinary[name], msg=name)


def test_the_strength_rises_as_in_its_source():
    np.testing.assert_allclose(
        [strength_at(p, 3.0) for p in (0.0, 0.1, 0.5)], [3 * math.tanh(5 * p) for p in (0.0, 0.1, 0.5)]
    )


def test_the_classifier_s_loss_is_its_formula(on_base):
    """The class, and whether an image is drawn; a batch that says nothing is real."""
    strategy = on_base()
    phase = strategy.phases(TASKS[1])[1]
    net = strategy.build(phase).module.eval()
    batch = some_batch(7, 5, number=3)
    for drawn in (None, torch.tensor([False, True])):
        batch.drawn = drawn
        losses = strategy.training_step(phase, batch, net)
        with torch.no_grad():
            logits, domains = (one.double().log_softmax(dim=1) for one in net(batch.sample, 0.0))
        second = 0 if drawn is None else 1
        expected = [-logits[0, 3] - domains[0, 0], -logits[1, 0] - domains[1, second]]
        np.testing.assert_allclose(losses.detach(), expected, rtol=1e-5)


def test_the_reversal_gets_stronger_during_a_phase(on_base):
    strategy, seen = on_base(domain_weight=2.0), []
    phase = strategy.phases(TASKS[1])[1]

    def net(sample, strength):
        seen.append(strength)
        return torch.zeros(1, 4), torch.zeros(1, 2)

    for number in (0, 6):
        strategy.training_step(phase, some_batch(7, number=number), net)
    assert seen == [0.0, strength_at(6 / 12, 2.0)]


def test_the_first_classifier_has_no_domain_head(on_base):
    strategy = on_base()
    assert isinstance(strategy.build(strategy.phases(TASKS[0])[1]).module, nn.Sequential)


@pytest.mark.parametrize("selection", ["confidence", "none"])
def test_drawn_images_replace_a_share_of_the_real_ones_of_their_class(selection, on_base):
    strategy = on_base(synthetic_share=0.4, selection=selection)
    phase = strategy.phases(TASKS[1])[1]
    strategy._generated = {5: grey(50), 1: grey(10)}
    # Of each new class, one image in two is bright.
    strategy._new = {0: torch.cat([grey(100), grey(200)]), 7: torch.cat([grey(107), grey(207)])}
    # It finds bright images likely to be of any class of the task.
    strategy._live = Brightness()
    torch.manual_seed(0)
    mixed = strategy.make_batch(phase, some_batch(*[0, 7] * 1000))
    levels = ((mixed.sample[:, 0, 0, 0] + 1) * 127.5).round()
    is_new = torch.isin(mixed.class_ids, torch.tensor([0, 7]))
    assert abs(is_new.double().mean() - 0.5) < 0.05
    assert mixed.drawn[~is_new].all()
    assert abs(mixed.drawn[is_new].double().mean() - 0.4) < 0.05
    bright = 0
    for class_id, expected in ((0, {100, 200}), (7, {107, 207})):
        shown = levels[mixed.drawn & (mixed.class_ids == class_id)]
        assert set(shown.tolist()) == expected
        bright += int((shown >= 200).sum())
    # The likelier of two, or any.
    share = bright / int(mixed.drawn[is_new].sum())
    assert abs(share - (0.75 if selection == "confidence" else 0.5)) < 0.06
    assert strategy._live.training


class Brightness(nn.Module):
    """Logits: the mean for classes of the task, else 0. In training mode, it fails."""

    def forward(self, images):
        assert not self.training
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([0 * mean, 0 * mean, mean, mean], dim=1)


def test_the_likeliest_of_each_group_is_chosen():
    logits = torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 0.0], [2.0, 0.0]])
    classifier = nn.Identity()
    assert likeliest_of(classifier, logits, torch.tensor([1, 1, 0, 0]), 2).tolist() == [1, 2]
    assert likeliest_of(classifier, logits, torch.tensor([0, 0, 1, 1]), 2).tolist() == [0, 3]


def test_steps_and_images_of_its_phases(tmp_path):
    """New classes are seen as often as by an adapter; images of all past and new classes are drawn, five of each."""
    strategy = with_options(tmp_path)
    steps = {p.name: p.settings.train_steps for task in TASKS for p in strategy.phases(task)}
    assert steps == {
        **{"base": 6, "task_2": 11, "task_3": 5},
        **{"classifier_task_1": 6, "classifier_task_2": 12, "classifier_task_3": 15},
    }
    assert [strategy.replay_evaluations(task) for task in TASKS] == [0, 4 * 5 * 4, 5 * 5 * 4]
    plain = with_options(tmp_path, **PLAIN)
    assert [plain.phases(task)[0].settings.train_steps for task in TASKS[1:]] == [8, 4]
    assert [plain.replay_evaluations(task) for task in TASKS] == [0, 2 * 5 * 4, 4 * 5 * 4]
    epochs = make_strategy("diffclass", tmp_path, adapter_train_steps=None, adapter_epochs=3)
    assert epochs.phase_settings(TASKS[1]).epochs == 4


def test_what_it_keeps_grows_by_a_lora_for_each_task_and_a_row_for_each_class(learned):
    strategy, _ = learned
    adapters = {c: tensors(strategy, c) for c in (0, 7, 3)}
    (whole,) = {sum(t.nbytes for t in one.values()) for one in adapters.values()}
    rows = {c: one.pop(VECTOR) for c, one in adapters.items()}
    assert all(torch.equal(t, adapters[7][key]) for key, t in adapters[0].items())
    assert not torch.equal(rows[0], rows[7])
    (_, second, third), row = memory_reports(RunFolder(strategy.setting.output_dir)), rows[3].nbytes
    heads = [strategy._head_bytes(task) for task in TASKS]
    assert third["persistent"] - second["persistent"] == whole + heads[2] - heads[1]
    assert [second["per_class"], third["per_class"]] == [2 * row + heads[1], 3 * row + heads[2]]
    assert strategy.grows_with_tasks


@pytest.mark.parametrize("targets", ["convolutions", "both"])
def test_other_layers_are_sampled_as_they_were_trained(targets, on_base):
    strategy = on_base(targets=targets)
    phase = strategy.phases(TASKS[1])[0]
    trainable = strategy.build(phase)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            parameter += 0.1 * torch.randn_like(parameter)
    strategy.end_phase(phase, trainable)
    noisy, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.9])
    with torch.no_grad(), strategy.inference([0, 7]) as pipe:
        expected = trainable.module.eval()(noisy, 1000 * sigma, torch.tensor([2, 3])).sample
        torch.testing.assert_close(pipe.predict_velocity(noisy, sigma, [0, 7]), expected)
