"""The penalty of C-LoRA against its formula and finite differences."""

from __future__ import annotations

import pytest
import torch
from concept_strategies import learn, make_strategy

from funlora_hf.continual.strategies.low_rank import pair_parameters


@pytest.mark.parametrize("layers", ["kv", "convolutions"])
def test_penalty(layers, tmp_path):
    options = {"arguments": {"target_modules": layers, "rank": 2}, "strategy_options": {"penalty": 3.0}}
    strategy = make_strategy("clora", tmp_path / "run", nouns="bc", **options)
    tasks, found = strategy.setting.tasks, []
    build = strategy.build

    def recorded(phase):
        trainable = build(phase)
        found.append(strategy.penalty())
        return trainable

    strategy.build = recorded
    learn(strategy)
    # No past; and B is 0.
    assert found[0] == 0.0
    assert found[1].item() == 0.0

    strategy = make_strategy("clora", tmp_path / "run", nouns="bc", **options)
    strategy.kept.path(tasks[1]).rename(strategy.kept.path(tasks[0]))
    (phase,) = strategy.phases(tasks[1])
    trainable = build.__func__(strategy, phase)
    draw = torch.Generator().manual_seed(0)
    for parameter in trainable.parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    strategy._past = {name: 10 * past.double() for name, past in strategy._past.items()}
    pairs = pair_parameters(strategy.model.denoiser)
    expected = sum(
        ((strategy._past[name].abs() * (B.flatten(1) @ A.flatten(1))) ** 2).sum() for name, (A, B) in pairs.items()
    )
    penalty = strategy.penalty()
    torch.testing.assert_close(penalty, 3 * expected)
    penalty.backward()
    for parameter in (part for pair in pairs.values() for part in pair):
        values, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in (0, len(values) // 2):
            start, sides = values[index].item(), []
            for side in (1e-4, -1e-4):
                values[index] = start + side
                sides.append(strategy.penalty().item())
            values[index] = start
            assert gradient[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-5, abs=1e-9)
    strategy.release_phase(phase, trainable)


def test_norms_of_the_products_are_told(tmp_path):
    strategy = make_strategy("clora", tmp_path / "run")
    expected, end = [], strategy.end_phase

    def recorded(phase, trainable):
        pairs = pair_parameters(strategy.model.denoiser).values()
        expected.append(sum((B @ A).square().sum() for A, B in pairs).sqrt().item())
        end(phase, trainable)

    strategy.end_phase = recorded
    learn(strategy)
    assert strategy.details()["product_norms"] == pytest.approx(expected, rel=1e-5)
