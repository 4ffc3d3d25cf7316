"""The penalties on the pairs of earlier tasks, against their formulas and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from funlora_hf.continual.strategies.merging_rules import unpack
from funlora_hf.continual.strategies.penalty_rules import (
    CLoraRule,
    CLoraRuleOptions,
    IncLoraRule,
    OLoraRule,
    OLoraRuleOptions,
    product_norm,
)
from funlora_hf.continual.strategies.weight_changes import Pair


SHAPES = {"first": (5, 7), "second": (4, 6)}
WEIGHT = 0.3
RULES = {
    "o_lora, B": OLoraRule(2, OLoraRuleOptions(penalty=WEIGHT)),
    "o_lora, A": OLoraRule(2, OLoraRuleOptions(penalty=WEIGHT, orthogonal="A")),
    "clora": CLoraRule(2, CLoraRuleOptions(penalty=WEIGHT)),
}


def pairs_of(task, rank=2):
    generator = torch.Generator().manual_seed(task)
    return {
        layer: Pair(
            torch.randn(rank, inputs, generator=generator, dtype=torch.float64),
            torch.randn(outputs, rank, generator=generator, dtype=torch.float64),
        )
        for layer, (outputs, inputs) in SHAPES.items()
    }


def kept_after(rule, tasks):
    kept = {}
    for task in range(tasks):
        kept = rule.merge(kept, pairs_of(task))
    return kept


def by_hand(name, past, new):
    """The formula, for one layer after the other and, but for clora, one earlier task after the other."""
    total = 0.0
    for layer, (A, B) in ((layer, (A.numpy(), B.numpy())) for layer, (A, B) in new.items()):
        earlier = [(pairs[layer].A.numpy(), pairs[layer].B.numpy()) for pairs in past]
        if name == "clora":
            total += np.linalg.norm(sum(B_s @ A_s for A_s, B_s in earlier) * (B @ A), "fro") ** 2
        else:
            total += sum(np.abs(B_s.T @ B if name.endswith("B") else A_s @ A.T).sum() for A_s, B_s in earlier)
    return WEIGHT * total


@pytest.mark.parametrize("name", RULES)
def test_the_formula(name):
    past, new = [pairs_of(task) for task in range(3)], pairs_of(3)
    penalty = RULES[name].penalty(kept_after(RULES[name], 3), new)
    assert penalty.item() == pytest.approx(by_hand(name, past, new), rel=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_there_is_none_without_a_past(name):
    assert RULES[name].penalty({}, pairs_of(0)) == 0.0
    assert RULES[name].penalty({}, {}) == 0.0


@pytest.mark.parametrize("name", RULES)
def test_gradients_against_finite_differences(name):
    """Away from B = 0, and from the kinks of the absolute values."""
    rule = RULES[name]
    kept, new = kept_after(rule, 2), pairs_of(2)
    parameters = [part.requires_grad_() for pair in new.values() for part in pair]
    assert torch.autograd.gradcheck(lambda *_: rule.penalty(kept, new), parameters)
    rule.penalty(kept, new).backward()
    unused = {"o_lora, B": "A", "o_lora, A": "B"}.get(name)
    for pair in new.values():
        assert {what for what, part in pair._asdict().items() if part.grad is None} == {unused} - {None}


@pytest.mark.parametrize("name", RULES)
def test_at_the_start_a_penalty_on_b_or_the_product_is_zero(name):
    new = {layer: Pair(A, torch.zeros_like(B)) for layer, (A, B) in pairs_of(2).items()}
    assert (RULES[name].penalty(kept_after(RULES[name], 2), new).item() == 0) == (name != "o_lora, A")


def test_pairs_are_kept_one_after_the_other():
    rule = IncLoraRule(2, None)
    kept = kept_after(rule, 3)
    for layer, (A, B) in unpack(kept).items():
        torch.testing.assert_close(A, torch.cat([pairs_of(task)[layer].A for task in range(3)]), rtol=0, atol=0)
        torch.testing.assert_close(B, torch.cat([pairs_of(task)[layer].B for task in range(3)], 1), rtol=0, atol=0)
        total = sum(pairs_of(task)[layer].B @ pairs_of(task)[layer].A for task in range(3))
        torch.testing.assert_close(rule.deltas(kept)[layer], total)
    assert rule.grows
    assert rule.penalty(kept, pairs_of(3)) == 0.0


def test_the_norm_of_a_product():
    found = product_norm(pairs_of(0)).item()
    expected = np.concatenate([(B @ A).numpy().ravel() for A, B in pairs_of(0).values()])
    assert found == pytest.approx(np.linalg.norm(expected), rel=1e-12)
