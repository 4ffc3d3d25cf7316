"""The penalty of l2 against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import TASKS, learn, make_strategy

from funlora_hf.continual.strategies.sequential import CLASS_VECTORS


def test_penalty(tmp_path):
    strategy = learn(make_strategy("l2", tmp_path, tasks=TASKS[:2], strategy_options={"penalty": 3}))
    assert strategy.penalty() == 0.0
    (phase,) = strategy.phases(TASKS[1])
    trainable = strategy.build(phase)
    assert strategy.penalty().item() == 0
    draw, expected = torch.Generator().manual_seed(0), {}
    for name, parameter in trainable.parameters.items():
        change = torch.randn(parameter.shape, generator=draw)
        parameter.data += change
        expected[name] = change.numpy().astype(np.float64)
    vectors = expected.pop(CLASS_VECTORS)
    penalty = strategy.penalty()
    assert penalty.item() == pytest.approx(3 * sum((one**2).sum() for one in expected.values()), rel=1e-5)
    penalty.backward()
    for name, one in expected.items():
        np.testing.assert_allclose(trainable.parameters[name].grad, 6 * one, rtol=1e-4, atol=1e-5)
    assert vectors.any()
    assert trainable.parameters[CLASS_VECTORS].grad is None
    strategy.release_phase(phase, trainable)
    assert strategy.penalty() == 0.0


def test_the_first_task_has_no_penalty(tmp_path):
    strategy = make_strategy("l2", tmp_path)
    (phase,) = strategy.phases(TASKS[0])
    strategy.build(phase)
    assert strategy.penalty() == 0.0
