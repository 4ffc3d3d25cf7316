"""The penalty of C-LoRA in a run of concepts, and the norms that it tells."""

from __future__ import annotations

import pytest
import torch
from concept_strategies import learn, make_strategy

from funlora_hf.continual.strategies.low_rank import pair_parameters
from funlora_hf.continual.strategies.merging_rules import only


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
    trainable = strategy.build(phase)
    draw = torch.Generator().manual_seed(0)
    for parameter in trainable.parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    pairs, past = pair_parameters(strategy.model.denoiser), only(strategy.kept_before(phase), "delta")
    assert past.keys() == pairs.keys()
    expected = sum(((past[name].abs() * (B.flatten(1) @ A.flatten(1))) ** 2).sum() for name, (A, B) in pairs.items())
    penalty = strategy.penalty()
    torch.testing.assert_close(penalty, 3 * expected)
    penalty.backward()
    assert all(part.grad.any() for pair in pairs.values() for part in pair)
    strategy.release_phase(phase, trainable)
    assert strategy.penalty() == 0.0


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
