"""The optimizer of mofo against Adam and against its formula in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from strategies import TASKS, learn, make_strategy
from torch import nn

from funlora_hf.continual.strategies.mofo import MofoAdamW, largest
from funlora_hf.continual.strategies.sequential import CLASS_VECTORS


RATE, BETAS, EPS = 0.01, (0.9, 0.999), 1e-8


def parameters():
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((3, 5), (4,), (1,), ())]


def optimizer(weights, share, **how):
    groups = [{"params": weights[:2], "factor": 1.0}, {"params": weights[2:], "factor": 0.1}]
    return MofoAdamW(groups, filtered=weights, share=share, lr=RATE, weight_decay=0.0, **how)


def gradients(step):
    draw = torch.Generator().manual_seed(step + 1)
    return [torch.randn(one.shape, generator=draw) for one in parameters()]


def steps(weights, adam, count=6):
    for step in range(count):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        adam.step()
    return weights


@pytest.mark.parametrize("fused", [None, True])
def test_share_1_is_adam_to_the_bit(fused):
    adam = parameters()
    expected = steps(adam, torch.optim.AdamW(adam, lr=RATE, weight_decay=0.0, fused=fused))
    weights = parameters()
    found = steps(weights, optimizer(weights, 1.0, fused=fused))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("share", [0.5, 0.01])
def test_formula(share, fused):
    weights = parameters()
    found = steps(weights, optimizer(weights, share, fused=fused))
    expected = [one.detach().numpy().astype(np.float64).copy() for one in parameters()]
    moments = [(np.zeros(one.shape), np.zeros(one.shape)) for one in expected]
    for step in range(6):
        for index, gradient in enumerate(gradients(step)):
            g, (m, v) = gradient.numpy().astype(np.float64), moments[index]
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
            moments[index] = m, v
            m_hat, v_hat = m / (1 - BETAS[0] ** (step + 1)), v / (1 - BETAS[1] ** (step + 1))
            kept = max(1, math.ceil(share * m.size))
            threshold = np.sort(np.abs(m_hat), axis=None)[-kept]
            expected[index] -= np.where(np.abs(m_hat) >= threshold, RATE * m_hat / (np.sqrt(v_hat) + EPS), 0)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.detach().numpy(), other, rtol=1e-5, atol=1e-6)


def test_a_fused_step_that_is_skipped_changes_nothing():
    weights = parameters()
    adam = optimizer(weights, 0.5, fused=True)
    steps(weights, adam, 1)
    before = [one.detach().clone() for one in weights]
    moments = [adam.state[one]["exp_avg"].clone() for one in weights]
    adam.found_inf = torch.tensor(1.0)
    steps(weights, adam, 1)
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
    assert all(torch.equal(adam.state[one]["exp_avg"], other) for one, other in zip(weights, moments, strict=True))


def test_parameters_without_a_gradient_stay():
    weights = parameters()
    before = [one.detach().clone() for one in weights]
    adam = optimizer(weights, 0.5)
    weights[0].grad = torch.ones(3, 5)
    adam.step()
    assert [torch.equal(one, other) for one, other in zip(weights, before, strict=True)] == [False, True, True, True]


@pytest.mark.parametrize(
    ("size", "share", "count"), [(100, 0.07, 7), (5, 0.5, 3), (1, 0.5, 1), (9, 1e-9, 1), (6, 1, 6)]
)
def test_number_of_entries(size, share, count):
    assert largest(torch.randn(size), share).sum() == count


def test_a_step_of_a_task_changes_half_of_each_tensor(tmp_path):
    """But of class vectors, and of all in the base's phase, which is plain Adam."""
    options = {"base_train_steps": 1, "adapter_train_steps": 1, "base_ema_decay": 0.0, "max_train_steps": 1}
    strategy = make_strategy("mofo", tmp_path, tasks=TASKS[:2], **options)
    build, after_step, live, changed = strategy.build, strategy.after_step, {}, {}

    def built(phase):
        trainable = build(phase)
        live[phase.name] = {name: (one, one.detach().clone()) for name, one in trainable.parameters.items()}
        return trainable

    def stepped(phase):
        after_step(phase)
        changed[phase.name] = {
            name: ((one != old).sum().item(), one.numel()) for name, (one, old) in live[phase.name].items()
        }

    strategy.build, strategy.after_step = built, stepped
    learn(strategy)
    assert all(count > size / 2 or size < 3 for count, size in changed["base"].values())
    task = changed["task_2"]
    task.pop(CLASS_VECTORS)
    assert all(count <= math.ceil(size / 2) for count, size in task.values())
    assert sum(count for count, _ in task.values()) > 0.4 * sum(size for _, size in task.values())
