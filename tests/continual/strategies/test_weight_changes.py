"""The maths of low-rank changes, against NumPy in float64 and PEFT's own merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from funlora_hf.continual.strategies.weight_changes import (
    Pair,
    concatenated,
    larger_magnitude,
    nullspace_start,
    product,
    rank_space_start,
    row_space,
    summed_factors,
    truncated,
)


def pair(rank, outputs=5, inputs=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Pair(
        torch.randn(rank, inputs, generator=generator, dtype=dtype),
        torch.randn(outputs, rank, generator=generator, dtype=dtype),
    )


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))


@given(SHAPES)
@settings(deadline=None, max_examples=40)
def test_concatenation_is_the_dense_sum_and_factor_sum_adds_the_cross_terms(shape):
    first, second, outputs, inputs, seed = shape
    old, new = pair(first, outputs, inputs, seed), pair(second, outputs, inputs, seed + 1)
    dense = old.B.numpy() @ old.A.numpy() + new.B.numpy() @ new.A.numpy()
    joined = concatenated(old, new)
    assert joined.A.shape == (first + second, inputs)
    np.testing.assert_allclose(product(joined).numpy(), dense, atol=1e-12)
    if first == second:
        cross = old.B.numpy() @ new.A.numpy() + new.B.numpy() @ old.A.numpy()
        np.testing.assert_allclose(product(summed_factors(old, new)).numpy(), dense + cross, atol=1e-12)


@given(st.integers(1, 7), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_truncation_is_the_nearest_of_its_rank(rank, seed):
    delta = product(pair(4, seed=seed))
    near = truncated(delta, rank)
    assert near.A.shape == (rank, 7)
    assert near.B.shape == (5, rank)
    values = np.linalg.svd(delta.numpy(), compute_uv=False)
    error = np.linalg.norm(delta.numpy() - product(near).numpy())
    np.testing.assert_allclose(error, np.linalg.norm(values[rank:]), atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_peft_merges_to_the_same(kind):
    """`add_weighted_adapter` has these three as "cat", "linear" and "svd"."""
    layer = nn.Linear(7, 5) if kind == "linear" else nn.Conv2d(3, 5, 2)
    model = nn.Sequential(layer)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(model, config, adapter_name="old")
    model.add_adapter("new", config)
    lora = model.base_model.model[0]
    old, new = (Pair(lora.lora_A[n].weight.flatten(1), lora.lora_B[n].weight.flatten(1)) for n in ("old", "new"))
    ours = {
        "cat": concatenated(old, new),
        "linear": summed_factors(old, new),
        "svd": truncated(product(old) + product(new), 2),
    }
    for combination, expected in ours.items():
        model.add_weighted_adapter(["old", "new"], [1.0, 1.0], combination, combination_type=combination, svd_rank=2)
        merged = lora.get_delta_weight(combination).flatten(1)
        torch.testing.assert_close(product(expected), merged, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_running_maximum_is_that_of_all_tasks(tasks, seed):
    """With ties, which the newest takes."""
    changes = np.random.default_rng(seed).integers(-2, 3, (tasks, 4, 3)).astype(np.float64)
    running = torch.from_numpy(changes[0])
    for change in changes[1:]:
        running = larger_magnitude(running, torch.from_numpy(change))
    magnitudes = np.abs(changes)
    newest = tasks - 1 - np.argmax(magnitudes[::-1], axis=0)
    np.testing.assert_array_equal(running.numpy(), np.take_along_axis(changes, newest[None], axis=0)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_start_in_the_nullspace_meets_nothing_learned(dtype, tolerance):
    delta = product(pair(3, outputs=6, inputs=9, dtype=dtype))
    basis = row_space(delta)
    assert basis.shape == (9, 3)
    np.testing.assert_allclose((basis.T @ basis).numpy(), np.eye(3), atol=tolerance)
    np.testing.assert_allclose((delta @ basis @ basis.T).numpy(), delta.numpy(), atol=10 * tolerance)
    gaussian = pair(6, inputs=9, seed=5, dtype=dtype).A
    start = nullspace_start(gaussian, basis)
    assert start.dtype == dtype
    np.testing.assert_allclose((start @ basis).numpy(), 0, atol=tolerance)
    np.testing.assert_allclose((delta @ start.T).numpy(), 0, atol=20 * tolerance)
    assert start.norm().item() == pytest.approx(gaussian.norm().item(), rel=1e-6)
    with pytest.raises(ValueError, match="take 3 of 9 inputs and `rank` 7 more are needed: lower the rank"):
        nullspace_start(pair(7, inputs=9, dtype=dtype).A, basis)


def test_nothing_learned_leaves_the_gaussian_as_it_is():
    gaussian = pair(3).A
    assert row_space(torch.zeros(5, 7, dtype=torch.float64)).shape == (7, 0)
    torch.testing.assert_close(nullspace_start(gaussian, row_space(torch.zeros(5, 7))).double(), gaussian)


def test_the_released_start_is_orthogonal_in_rank_space_alone():
    """As the design says: nearly one direction, and no more orthogonal to the old rows than a Gaussian is."""
    rank, inputs = 64, 640
    generator = torch.Generator().manual_seed(0)
    old, gaussian = (torch.randn(rank, inputs, generator=generator, dtype=torch.float64) / rank for _ in range(2))
    start = rank_space_start(gaussian, old)
    np.testing.assert_allclose((start * old).sum(dim=0).numpy(), 0, atol=1e-12)
    assert start.norm().item() == pytest.approx(gaussian.norm().item())
    energy = torch.linalg.svdvals(start).square()
    assert (energy[0] / energy.sum()).item() > 0.95
    overlap = [(a @ row_space(old)).norm() / a.norm() for a in (start, gaussian)]
    chance = (rank / inputs) ** 0.5
    assert overlap[1].item() == pytest.approx(chance, rel=0.2)
    assert overlap[0].item() > 0.5 * chance


def test_a_released_start_of_rank_one_is_zero():
    assert not rank_space_start(torch.ones(1, 4), torch.ones(1, 4)).any()
