"""The Fisher and the penalty of ewc against their formulas and finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from strategies import TASKS, Drawn, learn, make_strategy

from funlora_hf.continual.base import label_rows
from funlora_hf.continual.batches import RealImages
from funlora_hf.continual.strategies.ewc import Ewc
from funlora_hf.continual.strategies.sequential import CLASS_VECTORS


BATCHES = 3
OPTIONS = {"fisher_batches": BATCHES, "penalty": 2.0}


def by_hand(strategy, unet, task):
    """Losses of the batches of a task's Fisher, by number, and the Fisher itself, with the velocity written out."""
    *_, phase = strategy.phases(task)
    batches = RealImages(Drawn(), strategy.setting.training, torch.device("cpu"))(phase)
    labels = strategy.setting.seen(task)

    def loss(number):
        one = batches.batch(number)
        sample, noise, sigma = (part.to(unet.dtype) for part in (one.sample, one.noise, one.sigma))
        level = sigma[:, None, None, None]
        noisy = (1 - level) * sample + level * noise
        found = unet(noisy, 1000 * sigma, class_labels=label_rows(labels, one.class_ids)).sample
        return (found - (noise - sample)).square().mean()

    fisher = {name: torch.zeros_like(weight) for name, weight in unet.named_parameters() if name != CLASS_VECTORS}
    for number in range(BATCHES):
        unet.zero_grad()
        loss(number).backward()
        for name in fisher:
            fisher[name] += unet.get_parameter(name).grad ** 2 / BATCHES
    return loss, fisher


def test_fisher_of_a_task(tmp_path):
    strategy = learn(make_strategy("ewc", tmp_path, tasks=TASKS[:1], strategy_options=OPTIONS))
    found = load_file(tmp_path / "checkpoints/fisher/task_1.safetensors")
    assert found.pop("count") == 1
    unet = UNet2DModel.from_pretrained(tmp_path / "base/unet").eval()
    loss, expected = by_hand(strategy, unet, TASKS[0])
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-9, msg=name)
    # The largest entry by finite differences.
    name = max(found, key=lambda key: found[key].max())
    unet, index = unet.double(), found[name].argmax()
    values, squares = unet.get_parameter(name).data.view(-1), 0.0
    start = values[index].item()
    for number in range(BATCHES):
        sides = []
        for side in (1e-5, -1e-5):
            values[index] = start + side
            with torch.no_grad():
                sides.append(loss(number).item())
        values[index] = start
        squares += ((sides[0] - sides[1]) / 2e-5) ** 2 / BATCHES
    assert found[name].max().item() == pytest.approx(squares, rel=1e-2)


def test_the_mean_goes_over_all_tasks(tmp_path):
    strategy = make_strategy("ewc", tmp_path, strategy_options=OPTIONS)
    end_task, own = strategy.end_task, []

    def ended(task):
        newest = strategy.kept.newest(TASKS[: task.index + 1])
        own.append(by_hand(strategy, strategy._generator(task, strategy.kept.load(newest)), task)[1])
        end_task(task)

    strategy.end_task = ended
    learn(strategy)
    assert [path.name for path in (tmp_path / "checkpoints/fisher").iterdir()] == ["task_3.safetensors"]
    found = load_file(tmp_path / "checkpoints/fisher/task_3.safetensors")
    assert found["count"] == 3
    for name in own[0]:
        expected = sum(one[name] for one in own) / 3
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-8, msg=name)


def test_penalty(tmp_path):
    strategy = learn(make_strategy("ewc", tmp_path, tasks=TASKS[:2], strategy_options=OPTIONS))
    draw = torch.Generator().manual_seed(0)
    phase, _ = strategy.phases(TASKS[1])
    assert phase.name == "task_2"
    strategy.kept.path(TASKS[1]).unlink()
    fisher = load_file(tmp_path / "checkpoints/fisher/task_2.safetensors")
    strategy._before = lambda task: {name: torch.rand(one.shape, generator=draw) for name, one in fisher.items()}
    trainable = strategy.build(phase)
    assert strategy.penalty().item() == 0
    vectors = trainable.parameters[CLASS_VECTORS]
    assert len(strategy._terms) == len(trainable.parameters) - 1
    assert all(weight is not vectors for weight, *_ in strategy._terms)
    expected = 0.0
    for weight, _, one in strategy._terms:
        change = torch.randn(weight.shape, generator=draw)
        weight.data += change
        expected += 2 * (one.double() * change.double() ** 2).sum().item()
    assert strategy.penalty().item() == pytest.approx(expected, rel=1e-4)
    strategy.release_phase(phase, trainable)
    assert strategy.penalty() == 0.0


def test_the_base_has_no_penalty(tmp_path):
    strategy = make_strategy("ewc", tmp_path, strategy_options=OPTIONS)
    phase, _ = strategy.phases(TASKS[0])
    strategy.build(phase)
    assert strategy.penalty() == 0.0


@pytest.mark.parametrize(("images", "names"), [({}, []), ({5: 3}, []), ({5: 3, 1: 3}, ["fisher_1"])])
def test_a_given_base_has_a_fisher_if_its_classes_have_images(images, names, tmp_path):
    strategy = make_strategy("ewc", tmp_path)
    strategy = Ewc(replace(strategy.setting, has_base=True, num_images={0: 3, 7: 3, **images}))
    assert [phase.name for phase in strategy.phases(TASKS[0])] == names
    assert [phase.name for phase in strategy.phases(TASKS[1])] == ["task_2", "fisher_2"]
