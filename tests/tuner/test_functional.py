"""The maths against NumPy in float64, against autograd's numerical derivatives and against properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from funlora_hf import functional_matrix, initial_alpha, numerical_rank
from funlora_hf.continual.strategies.funlora import omega_range
from funlora_hf.tuner.functional import FUNCTIONS, OPERATIONS, SMALLEST_BASE, default_omega, expand, reduced_size


P = 4
# function and whether omega is given
VARIANTS = [
    ("cosine", False),
    ("cosine", True),
    ("power", False),
    ("power", True),
    ("shift", False),
    ("identity", False),
]
variants = pytest.mark.parametrize(("function", "with_omega"), VARIANTS)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def reference(A, B, alpha, omega, function):
    """F by the formulas of the method, written out term by term in NumPy float64."""
    A, B, alpha, omega = (None if t is None else t.detach().double().numpy() for t in (A, B, alpha, omega))
    product = A @ B
    if function == "identity":
        return product
    total = np.zeros_like(product)
    for i in range(len(alpha)):
        if function == "shift":
            term = np.roll(A, i, axis=0) @ np.roll(B, i, axis=1)
        elif function == "cosine":
            term = np.cos((i + 1 if omega is None else omega[i]) * product)
        elif omega is None:
            term = product ** (i + 1)
        else:
            term = np.sign(product) * np.abs(product) ** omega[i]
        total += alpha[i] * term
    return total / len(alpha)


def arguments(function, with_omega, *, rows=5, columns=7, r=2, p=P, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    alpha = None if function == "identity" else normal(p)
    omega = 0.5 + normal(p).abs() if with_omega else None
    return [normal(rows, r), normal(r, columns), alpha, omega]


def nonzero_arguments(function, with_omega, r):
    """Factors whose product is at least 0.2 in magnitude everywhere, of both signs."""
    A, B, alpha, omega = arguments(function, with_omega, r=r)
    B = (0.5 + B.abs()) / r
    A = (0.5 + A[:, :1].abs()).expand(-1, r) * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[:, None]
    return [A.clone(), B, alpha, omega]


@variants
@pytest.mark.parametrize("r", [1, 3])
def test_equals_numpy_formula_and_float64_stays(function, with_omega, r):
    args = arguments(function, with_omega, r=r)
    result = functional_matrix(*args, function=function)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), reference(*args, function), rtol=1e-12, atol=1e-12)


@quick
@given(
    variant=st.sampled_from(VARIANTS),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    r=st.integers(1, 4),
    p=st.integers(1, 12),  # more shifts than rows or columns wrap around
    seed=st.integers(0, 1000),
)
def test_equals_numpy_formula_for_any_shape(variant, rows, columns, r, p, seed):
    function, with_omega = variant
    args = arguments(function, with_omega, rows=rows, columns=columns, r=r, p=p, seed=seed)
    result = functional_matrix(*args, function=function)
    assert result.shape == (rows, columns)
    np.testing.assert_allclose(result.numpy(), reference(*args, function), rtol=1e-9, atol=1e-9)


def test_cosine_is_the_default_function():
    args = arguments("cosine", True)
    assert torch.equal(functional_matrix(*args), functional_matrix(*args, function="cosine"))


@pytest.mark.parametrize("with_omega", [False, True])
def test_power_of_a_negative_product(with_omega):
    # (-2)^2 is 4 as a plain power, and -4 in the signed form of a given omega
    A, B, alpha = torch.tensor([[-2.0]]), torch.ones(1, 1), torch.tensor([0.0, 2.0])
    omega = torch.tensor([1.0, 2.0]) if with_omega else None
    assert functional_matrix(A, B, alpha, omega, function="power").item() == pytest.approx(-4 if with_omega else 4)


@variants
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(function, with_omega, r, dtype):
    args = arguments(function, with_omega, r=r, dtype=dtype)
    result = functional_matrix(*args, function=function)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), reference(*args, function), rtol=1e-4, atol=1e-4)


@variants
@pytest.mark.parametrize("r", [1, 3])
def test_autocast_changes_nothing(function, with_omega, r):
    args = arguments(function, with_omega, r=r, dtype=torch.float32)
    expected = functional_matrix(*args, function=function)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = functional_matrix(*args, function=function)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@variants
@pytest.mark.parametrize("r", [1, 2])
def test_gradients(function, with_omega, r):
    args = nonzero_arguments(function, with_omega, r)
    assert np.abs(reference(args[0], args[1], None, None, "identity")).min() > 0.2
    given_args = [arg for arg in args if arg is not None]
    for arg in given_args:
        arg.requires_grad_()

    def evaluate(*tensors):
        remaining = iter(tensors)
        return functional_matrix(*(None if arg is None else next(remaining) for arg in args), function=function)

    assert torch.autograd.gradcheck(evaluate, given_args)


@pytest.mark.parametrize("omega", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_has_finite_gradients_at_zero(omega, dtype):
    A = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    B = torch.tensor([[0.0, 1.0, -1.0]], dtype=dtype, requires_grad=True)
    alpha = torch.ones(1, dtype=dtype, requires_grad=True)
    exponent = torch.tensor([omega], dtype=dtype, requires_grad=True)
    F = functional_matrix(A, B, alpha, exponent, function="power")
    assert torch.equal(F, torch.zeros_like(F))
    F.sum().backward()
    for tensor in (A, B, alpha, exponent):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def continued_power(x, omega):
    """sign(x) |x|^omega, below SMALLEST_BASE linear, and its slope; NumPy float64."""
    base = np.maximum(np.abs(x), SMALLEST_BASE)
    return x * base ** (omega - 1), np.where(np.abs(x) < SMALLEST_BASE, 1, omega) * base ** (omega - 1)


@pytest.mark.parametrize("omega", [-4.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.7, 8.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_power_of_zero_and_negative_entries_is_numpys(omega, dtype):
    """Over all magnitudes that factors come to, in every precision they may have."""
    entries = [0.0, -0.0, 1e-7, -1e-7, 1e-3, -1e-3, 0.5, -0.5, 1.0, -1.0, 60.0, -60.0]
    A = torch.tensor(entries, dtype=dtype)[:, None].requires_grad_()
    B = torch.ones(1, 1, dtype=dtype)
    exponent = torch.tensor([omega], requires_grad=True)
    F = functional_matrix(A, B, torch.ones(1), exponent, function="power")
    expected, slope = continued_power(A.detach().double().numpy(), omega)
    assert F.dtype == torch.float32
    np.testing.assert_allclose(F.detach().numpy(), expected, rtol=1e-5, atol=1e-37)
    # Not through the sum of F, whose gradient in float16 has to be one that float16 can hold.
    gradient, of_omega = torch.autograd.grad(F, (A, exponent), torch.full_like(F, 1e-3))
    assert torch.isfinite(of_omega).all()
    slope = 1e-3 * slope
    held = np.abs(slope) < torch.finfo(dtype).max
    assert held.all() or dtype == torch.float16
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    np.testing.assert_allclose(gradient.double().numpy()[held], slope[held], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("omega", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cosine_of_a_large_omega_is_numpys(omega, dtype):
    """The argument is rounded to float32, and no further: an error of 1e-7 of it."""
    args = arguments("cosine", False, p=1, dtype=dtype)
    A, B, alpha = args[:3]
    A.requires_grad_()
    omega = torch.tensor([omega])
    F = functional_matrix(A, B, alpha, omega)
    F.sum().backward()
    largest = (omega * (A.float().abs() @ B.float().abs()).max()).item()
    error = np.abs(F.detach().numpy() - reference(A, B, alpha, omega, "cosine")).max()
    assert error < 3e-7 * (1 + largest)
    assert torch.isfinite(A.grad).all()


def test_a_learned_omega_may_go_as_far_as_float32_bears():
    """At the ends of the range that is reported, the smallest and the largest entries are still finite."""
    low, high = omega_range("power", 2)
    A = torch.tensor([[0.0], [1e-7], [-1e-7], [-10.0], [10.0]], requires_grad=True)
    exponents = torch.tensor([low, high], requires_grad=True)
    F = functional_matrix(A, torch.ones(1, 1), torch.ones(2), exponents, function="power")
    F.sum().backward()
    assert all(torch.isfinite(tensor).all() for tensor in (F, A.grad, exponents.grad))
    # Where it ends: the linear part at zero is 1e-6 to the power of omega - 1.
    A.grad = None
    functional_matrix(A, torch.ones(1, 1), torch.ones(1), torch.tensor([-6.0]), function="power").sum().backward()
    assert not torch.isfinite(A.grad).all()
    assert omega_range("power", 100)[1] >= 100
    low, high = omega_range("cosine", 4)
    assert -low == high


@quick
@given(
    variant=st.sampled_from([v for v in VARIANTS if v[0] != "identity"]),
    seed=st.integers(0, 1000),
    factor=st.floats(-3, 3),
)
def test_is_linear_in_alpha(variant, seed, factor):
    function, with_omega = variant
    A, B, alpha, omega = arguments(function, with_omega, seed=seed)
    other = torch.randn(P, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    together = functional_matrix(A, B, alpha + factor * other, omega, function=function)
    apart = functional_matrix(A, B, alpha, omega, function=function) + factor * functional_matrix(
        A, B, other, omega, function=function
    )
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


def test_shapes_can_be_inferred_on_the_meta_device():
    A, B, alpha, _ = (None if t is None else t.to("meta") for t in arguments("cosine", False, r=1))
    assert functional_matrix(A, B, alpha).shape == (5, 7)


# The start


@quick
@given(
    function=st.sampled_from(FUNCTIONS),
    p=st.integers(1, 64),
    operation=st.sampled_from(OPERATIONS),
    r=st.integers(1, 3),
)
def test_initial_alpha_starts_as_the_identity(function, p, operation, r):
    alpha = initial_alpha(function, p, operation)
    A, B = torch.ones(3, r), torch.full((r, 4), 1 / r)
    if function == "identity":
        assert alpha is None
        return
    assert alpha.shape == (p,)
    assert alpha.dtype == torch.float32
    e = 0.0 if operation == "add" else 1.0
    for omega in (None, torch.arange(1.0, p + 1) if function in ("cosine", "power") else None):
        F = functional_matrix(A, B, alpha, omega, function=function)
        torch.testing.assert_close(F, torch.full((3, 4), e), rtol=0, atol=2e-6)


@pytest.mark.parametrize("function", ["shift", "power"])
@pytest.mark.parametrize("p", [1, 10, 33])
def test_initial_alpha_of_shift_and_power_is_the_papers_ones(function, p):
    assert torch.equal(initial_alpha(function, p), torch.ones(p))
    assert torch.equal(initial_alpha(function, p, "mul-add"), torch.ones(p))
    assert torch.equal(initial_alpha(function, p, "add"), torch.zeros(p))


@quick
@given(omega=st.lists(st.floats(0.1, 20), min_size=1, max_size=20), default=st.booleans())
def test_initial_alpha_of_cosine_has_the_least_norm(omega, default):
    p = len(omega)
    frequencies = np.arange(1, p + 1) if default else np.array(omega)
    v = np.cos(frequencies)[None] / p
    assume(np.linalg.norm(v) > 1e-3 / p)
    expected = np.linalg.lstsq(v, np.ones(1), rcond=None)[0]
    given_omega = None if default else torch.tensor(omega, dtype=torch.float64)
    alpha = initial_alpha("cosine", p, "mul", given_omega)
    assert alpha.dtype == (torch.float32 if default else torch.float64)
    np.testing.assert_allclose(alpha.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(alpha.numpy(), np.linalg.pinv(v)[:, 0], rtol=1e-6)


def test_alpha_of_one_would_not_be_the_identity_for_cosine():
    # The reason for `initial_alpha`: the literal start of arXiv 2510.02631 gives F = -0.14.
    F = functional_matrix(torch.ones(2, 1), torch.ones(1, 2), torch.ones(10))
    expected = sum(math.cos(i) for i in range(1, 11)) / 10
    np.testing.assert_allclose(F.numpy(), expected, rtol=1e-5)
    assert round(F[0, 0].item(), 2) == -0.14


def test_initial_alpha_refuses_an_omega_that_no_alpha_can_serve():
    omega = torch.full((3,), math.pi / 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`omega` is tensor.*is zero for every entry"):
        initial_alpha("cosine", 3, omega=omega)
    assert torch.equal(initial_alpha("cosine", 3, "add", omega), torch.zeros(3, dtype=torch.float64))


def test_default_omega():
    assert default_omega(3).tolist() == [1, 2, 3]


# Reduced parameters


@quick
@given(channels=st.integers(1, 2000), ratio=st.integers(1, 40))
def test_reduced_size_is_the_smallest_that_covers(channels, ratio):
    size = reduced_size(channels, ratio)
    assert size * ratio >= channels > (size - 1) * ratio


@quick
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    ratio=st.integers(1, 5),
    kernel=st.sampled_from([(), (1,), (3, 3), (1, 5)]),
)
def test_expand_is_repeat_and_crop(rows, columns, ratio, kernel):
    F = torch.randn(math.ceil(rows / ratio), math.ceil(columns / ratio))
    result = expand(F, ratio, torch.Size((rows, columns, *kernel)))
    expected = F.numpy().repeat(ratio, axis=0).repeat(ratio, axis=1)[:rows, :columns]
    assert result.shape == (rows, columns, *(1 for _ in kernel))
    np.testing.assert_array_equal(result.numpy().reshape(rows, columns), expected)
    assert (torch.ones(rows, columns, *kernel) * result).shape == (rows, columns, *kernel)


# Errors


@pytest.mark.parametrize(
    ("changes", "function", "words"),
    [
        ({}, "sine", ["`function`", "'sine'", "'cosine'", "'identity'"]),
        ({"A": torch.ones(3, 2)}, "cosine", ["`A`", "(3, 2)", "`B`", "(1, 4)"]),
        ({"A": torch.ones(3)}, "cosine", ["`A`", "(3,)"]),
        ({"B": torch.ones(4)}, "cosine", ["`B`", "(4,)"]),
        ({"alpha": None}, "cosine", ["`alpha`", "None", "'cosine'"]),
        ({"alpha": None}, "shift", ["`alpha`", "None", "'shift'"]),
        ({}, "identity", ["`alpha`", "given", "'identity'"]),
        ({"alpha": torch.ones(2, 1)}, "power", ["`alpha`", "(2, 1)"]),
        ({"alpha": torch.ones(0)}, "power", ["`alpha`", "(0,)"]),
        ({"omega": torch.ones(3)}, "cosine", ["`omega`", "(3,)", "(2,)"]),
        ({"omega": torch.ones(2)}, "shift", ["`omega`", "given", "'shift'"]),
        ({"omega": torch.ones(2), "alpha": None}, "identity", ["`omega`", "given", "'identity'"]),
    ],
)
def test_functional_matrix_errors_name_field_and_value(changes, function, words):
    args = {"A": torch.ones(3, 1), "B": torch.ones(1, 4), "alpha": torch.ones(2), "omega": None, **changes}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        functional_matrix(**args, function=function)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("sine", 2), ["`function`", "'sine'"]),
        (("cosine", 2, "divide"), ["`operation`", "'divide'", "'mul-add'"]),
        (("cosine", 0), ["`num_functions`", "0"]),
        (("cosine", 2.0), ["`num_functions`", "2.0"]),
        (("cosine", True), ["`num_functions`", "True"]),
        (("cosine", 2, "mul", torch.ones(3)), ["`omega`", "(3,)", "(2,)"]),
    ],
)
def test_initial_alpha_errors_name_field_and_value(args, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        initial_alpha(*args)
    for word in words:
        assert word in str(error.value)


# Numerical rank


def product_of_rank(rank, rows=12, columns=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


@pytest.mark.parametrize("rank", [0, 1, 3, 9])
def test_rank_of_a_product_of_that_rank(rank):
    assert numerical_rank(product_of_rank(rank)) == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_is_numpys_for_the_dtype(dtype):
    # Singular values at every magnitude, so that the tolerance decides.
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))
    F = ((left[:, :30] * torch.logspace(0, -20, 30, dtype=torch.float64)) @ right).to(dtype)
    # Away from the tolerance by more than the rounding of a singular value.
    expected = np.linalg.matrix_rank(F.double().numpy(), tol=40 * np.finfo(str(dtype).split(".")[1]).eps)
    assert numerical_rank(F) == expected
    assert 0 < expected < 30
    for tol in (0.5, 1e-2, 1e-4):
        assert numerical_rank(F, tol=tol) == np.linalg.matrix_rank(F.double().numpy(), tol=tol)


def test_tolerance_is_absolute_and_exclusive():
    F = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    assert [numerical_rank(F, tol=tol) for tol in (0, 0.5, 1.0, 2.0, 4.0)] == [3, 3, 2, 1, 0]


def test_rank_of_float32_rounding_is_not_counted():
    A, B, _, _ = arguments("identity", False, rows=64, columns=64, r=1, dtype=torch.float32)
    F = functional_matrix(A, B, function="identity")
    assert numerical_rank(F) == 1
    assert numerical_rank(F.double()) > 1


@pytest.mark.parametrize(
    ("function", "with_omega", "bound"), [("identity", False, 1), ("shift", False, P), ("power", False, P)]
)
def test_rank_of_functions_is_bounded(function, with_omega, bound):
    F = functional_matrix(*arguments(function, with_omega, rows=16, columns=16, r=1), function=function)
    assert numerical_rank(F) == bound


def test_cosine_of_a_rank_one_product_has_a_higher_rank():
    A, B, alpha, _ = arguments("cosine", False, rows=16, columns=16, r=1, p=10)
    assert numerical_rank(functional_matrix(A, B, alpha)) > 10


matrices = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31)).map(
    lambda key: torch.randn(key[0], key[1], generator=torch.Generator().manual_seed(key[2]))
)


@quick
@given(F=matrices, power=st.integers(-20, 20), data=st.data())
def test_rank_does_not_change_with_scale_transposition_or_order(F, power, data):
    rank = numerical_rank(F)
    assert 0 <= rank <= min(F.shape)
    # A power of two scales without rounding.
    assert numerical_rank(F * 2.0**power) == rank
    assert numerical_rank(F.T) == rank
    rows = data.draw(st.permutations(range(len(F))))
    assert numerical_rank(F[rows]) == rank
    assert numerical_rank(torch.cat([F, F])) == rank


@quick
@given(F=matrices, low=st.floats(0, 5), high=st.floats(0, 5))
def test_rank_falls_with_the_tolerance(F, low, high):
    low, high = sorted((low, high))
    assert numerical_rank(F, tol=low) >= numerical_rank(F, tol=high)


@quick
@given(F=matrices, ratio=st.integers(2, 4))
def test_rank_of_a_reduced_matrix_is_that_of_its_expansion(F, ratio):
    shape = torch.Size((len(F) * ratio - 1, F.shape[1] * ratio))
    assert numerical_rank(expand(F, ratio, shape)) == numerical_rank(F)


def test_rank_leaves_gradients_alone():
    F = torch.eye(3, requires_grad=True)
    assert numerical_rank(F) == 3
    assert F.grad is None


@pytest.mark.parametrize(
    ("F", "tol", "message"),
    [
        (torch.ones(3), None, "expected a floating matrix"),
        (torch.ones(2, 3, 3), None, "expected a floating matrix"),
        (torch.ones(2, 2, dtype=torch.long), None, "`F` is torch.int64"),
        (torch.tensor([[1.0, float("nan")]]), None, "not finite"),
        (torch.tensor([[1.0, float("inf")]]), 0.1, "not finite"),
        (torch.eye(2), -1.0, "`tol` is -1.0"),
        (torch.eye(2), float("nan"), "`tol` is nan"),
    ],
)
def test_rank_names_wrong_input(F, tol, message):
    with pytest.raises(ValueError, match=message):
        numerical_rank(F, tol)
