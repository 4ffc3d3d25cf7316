"""The fast F against the reference of `functional.py`, which its own tests hold against NumPy."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from funlora_hf import FunLoraConfig
from funlora_hf.tuner import FunLoraConv2d, functional, kernels
from funlora_hf.tuner.kernels import functional_matrix


METHODS = [
    pytest.param(function, learned, id=f"{function}{'-learned' if learned else ''}")
    for function in ("cosine", "power")
    for learned in (False, True)
]
methods = pytest.mark.parametrize(("function", "learned"), METHODS)
ranks = pytest.mark.parametrize("r", [1, 2])


@pytest.fixture(autouse=True)
def _no_size_is_too_small(monkeypatch):
    monkeypatch.setattr(kernels, "SMALLEST_SIZE", 0)


def tensors(rows, columns, *, r=1, learned=True, p=10, spread=0.2, dtype=torch.float64, seed=0):
    """A, B, alpha and omega near where training starts, as leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = 1 + spread * normal(rows, r), (1 + spread * normal(r, columns)) / r
    alpha, omega = 1 + normal(p), torch.arange(1, p + 1) + 0.3 * normal(p)
    made = [A, B, alpha, omega if learned else None]
    return [None if tensor is None else tensor.to(dtype).requires_grad_() for tensor in made]


def value_and_gradients(compute, inputs, function):
    F = compute(*inputs, function=function)
    weights = torch.cos(torch.arange(F.numel(), dtype=F.dtype)).view_as(F)
    found = torch.autograd.grad((F * weights).sum(), [tensor for tensor in inputs if tensor is not None])
    return [F.detach(), *found]


def worst(found, expected):
    """The largest error of each tensor, as a share of its largest entry (where that is 0, as it is)."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return [(a - b).abs().max().item() / (b.abs().max().item() or 1.0) for a, b in pairs]


@methods
@ranks
@pytest.mark.parametrize(("rows", "columns"), [(96, 40), (40, 96), (3, 200), (1, 1)])
def test_float64_is_the_reference_to_the_last_digits(function, learned, r, rows, columns):
    inputs = tensors(rows, columns, r=r, learned=learned)
    found = value_and_gradients(functional_matrix, inputs, function)
    expected = value_and_gradients(functional.functional_matrix, inputs, function)
    assert found[0].dtype == torch.float64
    assert max(worst(found, expected)) < 1e-11


@methods
@ranks
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1, 0.4])
def test_float32_is_as_close_to_the_truth_as_the_reference(function, learned, r, spread):
    inputs = tensors(96, 160, r=r, learned=learned, spread=spread, dtype=torch.float32)
    exact = value_and_gradients(
        functional.functional_matrix,
        [t if t is None else t.detach().double().requires_grad_() for t in inputs],
        function,
    )
    found = value_and_gradients(functional_matrix, inputs, function)
    reference = value_and_gradients(functional.functional_matrix, inputs, function)
    assert found[0].dtype == torch.float32
    for own, plain in zip(worst(found, exact), worst(reference, exact), strict=True):
        assert own < max(8 * plain, 4e-6)


@methods
@ranks
def test_gradcheck(function, learned, r):
    inputs = tensors(26, 7, r=r, learned=learned, p=3)
    given_ = [tensor for tensor in inputs if tensor is not None]

    def compute(*values):
        A, B, alpha, *omega = values
        return functional_matrix(A, B, alpha, *omega, function=function)

    assert torch.autograd.gradcheck(compute, given_)
    assert torch.autograd.gradgradcheck(compute, given_)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    p=st.integers(1, 12),
    spread=st.floats(0, 3),
    center=st.floats(-2, 2),
    learned=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_cosine_for_any_range_of_the_factors(rows, columns, p, spread, center, learned, seed):
    inputs = tensors(rows, columns, learned=learned, p=p, spread=spread, seed=seed)
    with torch.no_grad():
        inputs[0].add_(center)
    found = value_and_gradients(functional_matrix, inputs, "cosine")
    expected = value_and_gradients(functional.functional_matrix, inputs, "cosine")
    # In terms of what the p terms are in size, of which the sum may be a small remainder.
    alpha = inputs[2].detach().abs()
    steep = 12 * max(1.0, *(inputs[i].detach().abs().max().item() for i in (0, 1)))
    sizes = [1.0, steep * columns, steep * rows, 1.0 * rows * columns, steep * rows * columns]
    for own, plain, size in zip(found, expected, sizes[: len(found)], strict=True):
        scale = size * max(1.0, alpha.sum().item() / p)
        assert (own - plain).abs().max().item() < 1e-11 * scale * steep


def test_interpolation_matrix_is_lagranges():
    """Against the barycentric formula, in NumPy."""
    A = torch.linspace(0.2, 1.2, 22, dtype=torch.float64)[:, None]
    x, matrix = kernels._interpolation(A, *kernels._places(kernels._Nodes(9, 0.7, 0.5)))
    x, weights = x.numpy()[:, 0], np.empty(9)
    for k in range(9):
        weights[k] = 1 / np.prod([x[k] - x[j] for j in range(9) if j != k])
    terms = weights / (A.numpy() - x)
    np.testing.assert_allclose(matrix.numpy(), terms / terms.sum(axis=1, keepdims=True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("z", [0.0, 1e-9, 0.3, 4.0, 30.0])
def test_degree_is_enough_for_the_worst_cosine(z):
    for dtype, eps in ((torch.float32, 6e-8), (torch.float64, 1e-14)):
        degree = kernels._degree(z, torch.finfo(dtype).eps, limit=200)
        t = torch.linspace(-1, 1, 501, dtype=torch.float64)[:, None]
        x, matrix = kernels._interpolation(t, *kernels._places(kernels._Nodes(degree, 0.0, 1.0)))
        for phase in (0.0, 1.0):
            assert (matrix @ torch.cos(z * x + phase) - torch.cos(z * t + phase)).abs().max() < max(
                eps, 2e-14 * (1 + z)
            )


def test_degree_has_a_limit():
    assert kernels._degree(30.0, 1e-7, limit=40) is None
    for z in (float("inf"), float("nan")):
        assert kernels._degree(z, 1e-7, limit=10**6) is None


@methods
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_so(function, learned, value):
    inputs = tensors(40, 40, learned=learned)
    with torch.no_grad():
        inputs[0][3] = value
    F = functional_matrix(*inputs, function=function)
    assert not torch.isfinite(F[3]).any()
    assert torch.isfinite(F[[*range(3), *range(4, 40)]]).all()


def test_power_has_finite_gradients_at_zero_and_next_to_it():
    inputs = tensors(40, 40)
    with torch.no_grad():
        inputs[0][0], inputs[0][1], inputs[0][2] = 0.0, 1e-9, -1e-9
        inputs[3][0] = 0.5
    found = value_and_gradients(functional_matrix, inputs, "power")
    assert all(torch.isfinite(tensor).all() for tensor in found)
    assert max(worst(found, value_and_gradients(functional.functional_matrix, inputs, "power"))) < 1e-11


@methods
@pytest.mark.parametrize("operation", ["mul", "add", "mul-add"])
def test_a_layer_uses_them_in_forward_and_backward(function, learned, operation, monkeypatch):
    """A layer of the paper's size against one that takes the reference."""
    torch.manual_seed(0)
    config = FunLoraConfig(function=function, train_omega=learned, operation=operation, init_weights=False)
    layer = FunLoraConv2d(nn.Conv2d(160, 128, 3, padding=1), "x", config)
    x = torch.randn(2, 160, 4, 4)
    results = []
    for size in (0, 10**9):
        monkeypatch.setattr(kernels, "SMALLEST_SIZE", size)
        layer.zero_grad()
        output = layer(x)
        output.square().mean().backward()
        gradients = [p.grad.clone() for name, p in layer.named_parameters() if "funlora" in name]
        assert gradients
        results.append([output.detach(), *gradients])
    assert not torch.equal(results[0][0], results[1][0])
    assert max(worst(*results)) < 1e-4


class Saved:
    """Counts the bytes that autograd keeps for a backward pass, each storage once."""

    def __init__(self):
        self.storages = {}

    def __enter__(self):
        def pack(tensor):
            self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def total(self):
        return sum(self.storages.values())


@methods
@ranks
def test_at_most_one_matrix_is_kept_for_the_backward_pass(function, learned, r):
    inputs = tensors(256, 512, r=r, learned=learned, dtype=torch.float32)
    with Saved() as saved:
        F = functional_matrix(*inputs, function=function)
    assert saved.total < 1.1 * F.numel() * F.element_size()
    with Saved() as plain:
        functional.functional_matrix(*inputs, function=function)
    assert plain.total > 9 * F.numel() * F.element_size()


@methods
def test_what_other_devices_take_keeps_the_arguments_only(function, learned):
    inputs = tensors(96, 160, learned=learned, dtype=torch.float32)
    with Saved() as saved:
        F = kernels._recomputed(*inputs, function)
    assert saved.total < 0.1 * F.numel() * F.element_size()
    recomputed = value_and_gradients(lambda *given, function: kernels._recomputed(*given, function), inputs, function)
    expected = value_and_gradients(functional.functional_matrix, inputs, function)
    assert all(torch.equal(own, plain) for own, plain in zip(recomputed, expected, strict=True))


@pytest.mark.parametrize("p", [1, 2, 10, 64])
def test_frequencies_of_the_ladder_come_by_recurrence(p):
    x = torch.linspace(-7, 7, 101).reshape(1, -1)
    cosines, sines = kernels._terms(x, torch.ones(p), None, with_sines=True)
    angles = np.arange(1, p + 1)[:, None, None] * x.double().numpy()
    np.testing.assert_allclose(cosines.numpy(), np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sines.numpy(), np.sin(angles), atol=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("learned", [False, True])
def test_compiled_is_as_close_to_the_truth(learned):
    torch._dynamo.reset()
    compiled = partial(functional_matrix, compiled=True)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    for rows, columns, spread in ((256, 384, 0.1), (128, 512, 0.3), (512, 256, 0.2)):
        inputs = tensors(rows, columns, learned=learned, spread=spread, dtype=torch.float32)
        wide = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        truth = value_and_gradients(functional.functional_matrix, wide, "cosine")
        plain = worst(value_and_gradients(functional.functional_matrix, inputs, "cosine"), truth)
        found = worst(value_and_gradients(compiled, inputs, "cosine"), truth)
        assert all(own < 4 * other + 2e-6 for own, other in zip(found, plain, strict=True))
    graphs = stats["unique_graphs"] - before
    assert graphs >= 2
    # Other values, and another number of nodes with them, compile nothing anew.
    for seed, spread in ((1, 0.1), (2, 0.12)):
        inputs = tensors(256, 384, learned=learned, spread=spread, dtype=torch.float32, seed=seed)
        value_and_gradients(compiled, inputs, "cosine")
    assert stats["unique_graphs"] - before == graphs


def test_small_matrices_are_the_reference_to_the_bit(monkeypatch):
    monkeypatch.undo()
    inputs = tensors(64, 128, dtype=torch.float32)
    assert torch.equal(functional_matrix(*inputs), functional.functional_matrix(*inputs))
    monkeypatch.setattr(kernels, "SMALLEST_SIZE", 0)
    assert not torch.equal(functional_matrix(*inputs), functional.functional_matrix(*inputs))


@methods
def test_autocast_and_low_precision_inputs_change_nothing(function, learned):
    inputs = tensors(96, 160, learned=learned, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(functional_matrix, inputs, function)
    wide = [t if t is None else t.detach().float().requires_grad_() for t in inputs]
    expected = value_and_gradients(functional_matrix, wide, function)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    # The gradient of an input in bfloat16 comes in bfloat16.
    assert max(worst(found, expected)) < 0.01


@methods
def test_vmap(function, learned):
    both = [tensors(40, 30, learned=learned, seed=seed) for seed in (0, 1)]
    stacked = [torch.stack(pair).detach() for pair in zip(*both, strict=True) if pair[0] is not None]
    together = torch.vmap(lambda *values: functional_matrix(*values, function=function))(*stacked)
    for index, inputs in enumerate(both):
        expected = functional.functional_matrix(*inputs, function=function)
        torch.testing.assert_close(together[index], expected, rtol=1e-9, atol=1e-9)


def test_errors_are_those_of_the_reference():
    A, B, alpha, omega = tensors(4, 5)
    for arguments, text in (
        ({"function": "sine"}, "`function` is 'sine'"),
        ({"alpha": None}, "`alpha` is None"),
        ({"omega": omega[:3]}, "`omega` has shape"),
        ({"B": B.T}, "`A` has shape"),
    ):
        with pytest.raises(ValueError, match=text):
            functional_matrix(**{"A": A, "B": B, "alpha": alpha, "omega": omega, **arguments})
