"""The fixed matrices of Orthogonal Adaptation, and the sum of the products."""

from __future__ import annotations

import pytest
import torch
from concept_strategies import learn, make_strategy

from funlora_hf.continual.strategies.merging_rules import only


def strategy_of(folder, **options):
    return make_strategy("orthogonal_adaptation", folder, arguments={"rank": 3}, strategy_options=options)


def test_dealt_rows_are_orthogonal(tmp_path):
    strategy = strategy_of(tmp_path / "run")
    layer = next(iter(strategy._shapes()))
    fixed = [strategy.fixed(layer, number) for number in range(3)]
    for i, one in enumerate(fixed):
        for j, other in enumerate(fixed):
            torch.testing.assert_close(one @ other.T, torch.eye(3) * (i == j), rtol=0, atol=1e-6)


@pytest.mark.parametrize("basis", ["random", "gaussian"])
def test_other_bases(basis, tmp_path):
    strategy = strategy_of(tmp_path / "run", basis=basis)
    layer, other = (name for name in list(strategy._shapes())[:2])
    fixed = strategy.fixed(layer, 0)
    if basis == "random":
        torch.testing.assert_close(fixed @ fixed.T, torch.eye(3), rtol=0, atol=1e-6)
    assert torch.equal(fixed, strategy.fixed(layer, 0))
    assert not torch.equal(fixed, strategy.fixed(layer, 1))
    assert torch.equal(fixed, strategy.fixed(other, 0)) == (basis == "random")
    with (
        pytest.raises(ValueError, match="with basis=random need 17 orthogonal rows")
        if basis == "random"
        else _passes()
    ):
        make_strategy(
            "orthogonal_adaptation", tmp_path / "r", arguments={"rank": 17}, strategy_options={"basis": basis}
        )


class _passes:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_the_sum(tmp_path):
    """A is fixed while B is trained; only B is kept."""
    strategy = strategy_of(tmp_path / "run", merge_weight=0.5)
    ends, end = [], strategy.end_phase

    def recorded(phase, trainable):
        assert all("lora_B" in name or name.startswith("rows.") for name in trainable.parameters)
        ends.append({name: one.detach().clone() for name, one in strategy.model.denoiser.named_parameters()})
        end(phase, trainable)

    strategy.end_phase = recorded
    learn(strategy)
    kept = strategy.load(strategy.setting.tasks)
    assert {name.rpartition("/")[2] for name in kept} == {"B_0", "B_1", "B_2"}
    for layer, delta in strategy.deltas(kept).items():
        products = []
        for number, end_of_task in enumerate(ends):
            A, B = (end_of_task[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            assert torch.equal(A, strategy.fixed(layer, number))
            assert torch.equal(B, only(kept, f"B_{number}")[layer])
            products.append(B @ A)
        torch.testing.assert_close(delta, 0.5 * sum(products))
