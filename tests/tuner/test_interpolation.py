"""Large functional matrices, which are interpolated or computed again in the backward pass, against the plain formula."""

import math
import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv2d, linear

from funlora_hf import FunLoraConfig, functional_matrix
from funlora_hf.tuner import FunLoraConv2d, FunLoraLinear, compile_functional_matrices, functional


METHODS = [("cosine", True), ("cosine", False), ("power", True), ("power", False), ("shift", False)]
methods = pytest.mark.parametrize(
    ("function", "learned"),
    METHODS,
    ids=[f"{function}{'-learned' if learned else ''}" for function, learned in METHODS],
)
cosine_and_power = pytest.mark.parametrize(("function", "learned"), METHODS[:4])
ranks = pytest.mark.parametrize("r", [1, 2])


def formula(A, B, alpha=None, omega=None, *, function="cosine"):
    """F term by term, in the dtype of its arguments, with the gradients of torch's autograd."""
    x = A @ B
    if function == "identity":
        return x
    p = len(alpha)
    if function == "shift":
        terms = [A.roll(i, dims=0) @ B.roll(i, dims=1) for i in range(p)]
    elif function == "cosine":
        terms = [torch.cos((i + 1 if omega is None else omega[i]) * x) for i in range(p)]
    elif omega is None:
        terms = [x ** (i + 1) for i in range(p)]
    else:
        terms = [x * x.abs().clamp(min=1e-6) ** (omega[i] - 1) for i in range(p)]
    return torch.tensordot(alpha, torch.stack(terms), dims=1) / p


def factors(rows, columns, *, r=1, learned=True, p=10, spread=0.2, dtype=torch.float64, seed=0):
    """A, B, alpha and omega near the values at which training starts, as leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = 1 + spread * normal(rows, r), (1 + spread * normal(r, columns)) / r
    alpha, omega = 1 + normal(p), torch.arange(1, p + 1) + 0.3 * normal(p)
    made = [A, B, alpha, omega if learned else None]
    return [None if tensor is None else tensor.to(dtype).requires_grad_() for tensor in made]


def cast(tensors, dtype):
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def value_and_gradients(compute, tensors, function, autocast=False):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        F = compute(*tensors, function=function)
    weights = torch.cos(torch.arange(F.numel(), dtype=F.dtype)).view_as(F)
    return [F.detach(), *torch.autograd.grad((F * weights).sum(), [t for t in tensors if t is not None])]


def worst(found, expected):
    """The largest error of each tensor, relative to its largest entry (absolute if that is 0)."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return [(a - b).abs().max().item() / (b.abs().max().item() or 1.0) for a, b in pairs]


@pytest.fixture
def interpolated(monkeypatch):
    """A list that grows by one for every matrix that is interpolated."""
    calls = []
    original = functional._cosine_factors

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(functional, "_cosine_factors", counted)
    return calls


@pytest.fixture
def any_size(monkeypatch):
    """Small matrices are computed as large ones."""
    monkeypatch.setattr(functional, "INTERPOLATED_SIZE", 0)
    monkeypatch.setattr(functional, "RECOMPUTED_SIZE", 0)


# Accuracy of layers


KERNELS = {"linear": None, "1x1": 1, "3x3": 3}


def make_layer(rows, columns, kernel, **config):
    torch.manual_seed(0)
    size = KERNELS[kernel]
    if size is None:
        base, x = nn.Linear(columns, rows, bias=False), torch.rand(3, columns)
    else:
        base = nn.Conv2d(columns, rows, size, padding=size // 2, bias=False)
        x = torch.rand(1, columns, 2, 2)
    layer_cls = FunLoraLinear if size is None else FunLoraConv2d
    layer = layer_cls(base.requires_grad_(False), "x", FunLoraConfig(**config))
    return layer, x


def parameters(layer):
    """The adapter's parameters, without the prefix of their names."""
    return {key.removeprefix("funlora_").removesuffix(".x"): value for key, value in layer.adapter_tensors().items()}


def spread_out(layer, *, size, spread, balance, omega, seed):
    """Give a layer factors whose largest |A B| is `size`, and frequencies of both signs in the range `omega`.

    A is larger than B by a factor of about `balance` squared.
    """
    generator = torch.Generator().manual_seed(seed)
    found = parameters(layer)
    with torch.no_grad():
        for tensor in found.values():
            tensor.copy_(1 + spread * torch.randn(tensor.shape, generator=generator))
        for part in ("", "add_"):
            if f"{part}A" not in found:
                continue
            A, B = found[f"{part}A"], found[f"{part}B"]
            scale = math.sqrt(size / (A.double() @ B.double()).abs().max())
            A.mul_(scale * balance)
            B.mul_(scale / balance)
            if f"{part}alpha" in found:
                alpha = found[f"{part}alpha"]
                alpha.copy_(1 + torch.randn(alpha.shape, generator=generator))
            if f"{part}omega" in found:
                low, high = omega
                frequencies = found[f"{part}omega"]
                steps = torch.rand(frequencies.shape, generator=generator)
                frequencies.copy_(low * (high / low) ** steps)
                if layer.settings["x"].function == "cosine":
                    frequencies.mul_(torch.randn(frequencies.shape, generator=generator).sign())


def by_formula(layer, x, dtype):
    """The layer's output in a dtype, what each functional matrix adds to it, and the adapter's parameters as leaves."""
    config, base = layer.settings["x"], layer.get_base_layer()
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in parameters(layer).items()}

    def matrix(part):
        found = [leaves.get(f"{part}{name}") for name in ("A", "B", "alpha", "omega")]
        F = formula(*found, function=config.function)
        return F.reshape(*F.shape, *(1 for _ in base.weight.shape[2:]))

    def run(weight):
        weight = weight.expand_as(base.weight)
        return linear(x.to(dtype), weight) if x.dim() == 2 else conv2d(x.to(dtype), weight, padding=base.padding)

    weight = base.weight.to(dtype)
    changes = []
    if config.operation != "add":
        weight = weight * matrix("")
        changes.append(run(weight))
    if config.operation != "mul":
        term = matrix("add_" if config.operation == "mul-add" else "")
        weight = weight + term
        changes.append(run(term))
    return run(weight), changes, leaves


def assert_as_exact_as_autograd(layer, x, absolute=0.0):
    """Output and gradients are as close to float64 as plain float32 autograd, up to a factor of 4, or within 1e-5.

    The inputs are positive, and the loss grows with what each functional matrix does to the output. At random ones some
    gradients are sums that nearly cancel, whose rounding can be any share of them.
    """
    truth, changes, leaves = by_formula(layer, x, torch.float64)
    direction = sum(change / change.norm() for change in changes if change.norm() > 0).detach()
    direction = direction / direction.abs().sum()

    def with_gradients(output, tensors):
        gradients = torch.autograd.grad((output * direction.to(output.dtype)).sum(), list(tensors.values()))
        return dict(zip(("output", *tensors), (output.detach(), *gradients), strict=True))

    exact = with_gradients(truth, leaves)
    output, _, leaves = by_formula(layer, x, torch.float32)
    plain = with_gradients(output, leaves)
    own = with_gradients(layer(x), parameters(layer))
    for name, expected in exact.items():
        error, usual = ((found[name].double() - expected).abs().max().item() for found in (own, plain))
        bound = max(4 * usual, 1e-5 * expected.abs().max().item(), absolute)
        assert error <= bound, f"{name}: error {error}, that of float32 autograd {usual}"


def logarithmic(low, high):
    return st.floats(math.log(low), math.log(high)).map(math.exp)


@st.composite
def large_shapes(draw, least=1):
    """From 1 x 20000 to 1024 x 64, of at least 128 x 128 entries, and their transposes."""
    rows, entries = draw(st.integers(least, 1024)), draw(st.integers(128 * 128, 1024 * 64))
    return tuple(draw(st.permutations((rows, min(20_000, math.ceil(entries / rows))))))


operations = st.sampled_from(functional.OPERATIONS)
kernels = st.sampled_from(list(KERNELS))
seeds = st.integers(0, 10**6)
spreads = st.sampled_from([0.0, 1e-3, 0.1, 0.3, 1.0])
thorough = settings(deadline=None, derandomize=True, max_examples=150)
quick = settings(deadline=None, derandomize=True, max_examples=100)


def test_cosine_layers_are_as_exact_as_autograd(interpolated):
    """Over all shapes, numbers of functions, ranks, frequencies and sizes of A B."""
    examples = []

    @thorough
    @given(
        shape=large_shapes(),
        r=st.sampled_from([1, 1, 1, 2, 4]),
        p=st.integers(1, 32),
        size=logarithmic(1e-3, 30),
        highest=logarithmic(0.1, 30),
        spread=spreads,
        balance=st.sampled_from([1.0, 0.5, 2.0]),
        learned=st.booleans(),
        operation=operations,
        kernel=kernels,
        seed=seeds,
    )
    def check(shape, r, p, size, highest, learned, operation, kernel, **values):
        examples.append(shape)
        config = {"r": r, "num_functions": p, "train_omega": learned, "operation": operation}
        layer, x = make_layer(*shape, kernel, **config)
        spread_out(layer, size=size, omega=(0.1, highest), **values)
        assert_as_exact_as_autograd(layer, x)

    check()
    assert len(interpolated) > len(examples) / 8


SHAPES = [(1, 20000), (20000, 1), (24, 900), (64, 1024), (1024, 64), (128, 128), (256, 256), (512, 128)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("size", "highest"), [(1e-3, 0.1), (1e-3, 30.0), (1.0, 10.0), (30.0, 0.1), (30.0, 30.0)])
def test_cosine_layers_at_the_ends_of_the_ranges(rows, columns, size, highest):
    for r, p in ((1, 32), (1, 1), (4, 10)):
        layer, x = make_layer(rows, columns, "1x1", r=r, num_functions=p)
        spread_out(layer, size=size, spread=0.2, balance=1.0, omega=(0.1, highest), seed=p)
        assert_as_exact_as_autograd(layer, x)


@quick
@given(
    shape=large_shapes(),
    p=st.integers(1, 32),
    size=logarithmic(1e-12, 1e-3),
    highest=logarithmic(0.1, 30),
    spread=spreads,
    balance=st.sampled_from([1.0, 0.1, 10.0]),
    operation=operations,
    seed=seeds,
)
@example(shape=(128, 256), p=10, size=1e-40, highest=1.0, spread=0.1, balance=1.0, operation="mul", seed=0)
def test_tiny_arguments_have_gradients_of_small_absolute_error(shape, p, size, highest, operation, **values):
    """The gradients of A, B and omega vanish there."""
    layer, x = make_layer(*shape, "linear", num_functions=p, operation=operation)
    spread_out(layer, size=size, omega=(0.1, highest), **values)
    assert_as_exact_as_autograd(layer, x, absolute=1e-6)


def test_factors_of_zero():
    layer, x = make_layer(160, 128, "3x3", init_weights=False)
    for A in (layer.funlora_A["x"], layer.funlora_A["x"][:7], layer.funlora_B["x"]):
        with torch.no_grad():
            A.zero_()
        assert_as_exact_as_autograd(layer, x, absolute=1e-6)


@quick
@given(
    shape=large_shapes(least=16),  # of one row, the gradient of A is a single sum, which may nearly cancel
    method=st.sampled_from([("power", True), ("power", False), ("shift", False), ("identity", False)]),
    r=st.integers(1, 4),
    p=st.integers(1, 32),
    size=logarithmic(1e-3, 3),  # 30 to the power of 32 overflows
    spread=st.sampled_from([0.0, 0.1, 0.3]),
    operation=operations,
    kernel=kernels,
    seed=seeds,
)
def test_layers_of_other_functions_are_as_exact_as_autograd(shape, method, r, p, operation, kernel, **values):
    function, learned = method
    config = {"function": function, "train_omega": learned, "r": r, "num_functions": p, "operation": operation}
    layer, x = make_layer(*shape, kernel, **config)
    spread_out(layer, balance=1.0, omega=(0.1, 10.0), **values)
    assert_as_exact_as_autograd(layer, x)


def test_a_merged_layer_has_the_interpolated_weight(interpolated):
    layer, x = make_layer(256, 128, "3x3", init_weights=False)
    with torch.no_grad():
        expected = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert len(interpolated) == 2


# The function itself


@methods
@ranks
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 96), (3, 200), (1, 1)])
def test_float64_is_the_formula_to_the_last_digits(function, learned, r, rows, columns, any_size):
    tensors = factors(rows, columns, r=r, learned=learned)
    found = value_and_gradients(functional_matrix, tensors, function)
    assert found[0].dtype == torch.float64
    assert max(worst(found, value_and_gradients(formula, tensors, function))) < 1e-11


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    p=st.integers(1, 12),
    spread=st.floats(0, 2),
    center=st.floats(-2, 2),
    learned=st.booleans(),
    seed=seeds,
)
def test_there_are_enough_nodes_for_any_range_of_the_factors(rows, columns, p, spread, center, learned, seed):
    tensors = factors(rows, columns, p=p, spread=spread, learned=learned, seed=seed)
    with torch.no_grad():
        tensors[0].add_(center)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "INTERPOLATED_SIZE", 0)
        found = value_and_gradients(functional_matrix, tensors, "cosine")
    expected = value_and_gradients(formula, tensors, "cosine")
    # Compared with the size of the sums' terms, since what remains of the sums may be small.
    steep = 12 * max(1.0, *(tensor.detach().abs().max().item() for tensor in tensors[:2]))
    sizes = [1.0, steep * columns, steep * rows, 1.0 * rows * columns, steep * rows * columns]
    mean_alpha = max(1.0, tensors[2].detach().abs().mean().item())
    for own, plain, size in zip(found, expected, sizes[: len(found)], strict=True):
        assert (own - plain).abs().max().item() < 1e-11 * size * mean_alpha * steep


def test_gradients_of_interpolation(any_size, interpolated):
    """First and second derivatives, numerically."""
    tensors = factors(52, 48, p=2, spread=0.1)
    assert torch.autograd.gradcheck(functional_matrix, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(functional_matrix, tensors, fast_mode=True)
    small = factors(45, 44, p=1, spread=0.02)
    assert torch.autograd.gradcheck(functional_matrix, small)
    assert len(interpolated) > 4


@cosine_and_power
def test_gradients_of_what_is_computed_again(function, learned, any_size):
    tensors = [t for t in factors(6, 7, r=2, p=3, learned=learned) if t is not None]

    def compute(*values):
        return functional_matrix(*values, function=function)

    assert torch.autograd.gradcheck(compute, tensors)
    assert torch.autograd.gradgradcheck(compute, tensors)


def test_what_is_computed_again_under_autocast():
    """A backward pass that runs under autocast computes the terms again in float32."""
    tensors = factors(256, 256, p=3, spread=6.0, dtype=torch.float32)
    gradient = torch.randn(256, 256)
    expected = torch.autograd.grad(functional_matrix(*tensors), tensors, gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(functional_matrix(*tensors), tensors, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_when_it_interpolates(interpolated):
    """From 128 x 256 entries on at r = 1, where it needs far fewer nodes than there are rows and columns."""
    cases = [
        (1, factors(128, 256, p=3)),
        (1, factors(512, 64, p=3)),
        (0, factors(127, 256, p=3)),
        (0, factors(128, 256, p=3, r=2)),
        (0, factors(4, 8192, p=3)),
        (0, factors(128, 256, p=200)),
    ]
    for expected, tensors in cases:
        interpolated.clear()
        functional_matrix(*tensors)
        assert len(interpolated) == expected
    functional_matrix(*factors(256, 256, p=3), function="power")
    assert not interpolated


@methods
def test_small_matrices_are_the_formula_to_the_bit(function, learned, interpolated):
    tensors = factors(127, 256, learned=learned, dtype=torch.float32)
    F, expected = functional_matrix(*tensors, function=function), formula(*tensors, function=function)
    if function == "shift":  # one product instead of p of them
        torch.testing.assert_close(F, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(F, expected)
    assert not interpolated


@pytest.mark.parametrize("size", [(40, 40), (160, 160), (256, 256)])
@methods
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(size, function, learned, value):
    tensors = factors(*size, learned=learned, p=3, dtype=torch.float32)
    with torch.no_grad():
        tensors[0][7] = value
    F = functional_matrix(*tensors, function=function)
    spoiled = [7, 8, 9] if function == "shift" else [7]
    others = [row for row in range(size[0]) if row not in spoiled]
    assert not torch.isfinite(F[spoiled]).any()
    assert torch.isfinite(F[others]).all()


@pytest.mark.parametrize("index", [2, 3])
def test_alpha_or_omega_that_is_not_finite_spoils_all(index):
    tensors = factors(256, 160, dtype=torch.float32)
    with torch.no_grad():
        tensors[index][0] = float("nan")
    assert torch.isnan(functional_matrix(*tensors)).all()


@pytest.mark.parametrize("largest", [1e18, 1e25])
def test_factors_whose_product_overflows(largest):
    tensors = factors(256, 160, p=2, dtype=torch.float32)
    with torch.no_grad():
        for factor in tensors[:2]:
            factor[0, 0] = largest
    F = functional_matrix(*tensors)
    assert torch.isfinite(F[1:, 1:]).all()
    expected = formula(*tensors)
    torch.testing.assert_close(F, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("size", [40, 256])
def test_power_has_finite_gradients_at_zero_and_next_to_it(size):
    tensors = factors(size, size)
    with torch.no_grad():
        tensors[0][0], tensors[0][1], tensors[0][2] = 0.0, 1e-9, -1e-9
        tensors[3][0] = 0.5
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        cast_tensors = cast(tensors, dtype)
        found = value_and_gradients(functional_matrix, cast_tensors, "power")
        assert all(torch.isfinite(tensor).all() for tensor in found)
        assert max(worst(found, value_and_gradients(formula, cast_tensors, "power"))) < bound


@methods
@pytest.mark.parametrize("size", [(96, 160), (256, 256)])
def test_autocast_and_low_precision_inputs_change_nothing(function, learned, size):
    tensors = factors(*size, learned=learned, dtype=torch.bfloat16)
    found = value_and_gradients(functional_matrix, tensors, function, autocast=True)
    expected = value_and_gradients(functional_matrix, cast(tensors, torch.float32), function)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    # The gradient of a bfloat16 input is bfloat16.
    assert max(worst(found, expected)) < 0.01


@methods
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_values_are_the_same(function, learned, mode):
    for size in ((96, 200), (256, 256)):
        tensors = factors(*size, learned=learned, dtype=torch.float32)
        expected = functional_matrix(*tensors, function=function)
        with mode():
            assert torch.equal(functional_matrix(*tensors, function=function), expected)


@methods
@pytest.mark.parametrize("size", [(40, 30), (150, 130), (256, 256)])
def test_vmap(function, learned, size):
    both = [factors(*size, learned=learned, p=3, seed=seed) for seed in (0, 1)]
    stacked = [torch.stack(pair).detach() for pair in zip(*both, strict=True) if pair[0] is not None]
    together = torch.vmap(lambda *values: functional_matrix(*values, function=function))(*stacked)
    for index, tensors in enumerate(both):
        expected = formula(*tensors, function=function)
        torch.testing.assert_close(together[index], expected, rtol=1e-9, atol=1e-9)


@cosine_and_power
@ranks
@pytest.mark.parametrize("size", [(150, 130), (256, 256)])
def test_functional_gradients(function, learned, r, size):
    tensors = factors(*size, r=r, learned=learned, p=3)
    given_tensors = [t.detach() for t in tensors if t is not None]
    found = torch.func.grad(lambda A: functional_matrix(A, *given_tensors[1:], function=function).sum())(
        given_tensors[0]
    )
    (expected,) = torch.autograd.grad(formula(*tensors, function=function).sum(), tensors[:1])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@methods
def test_shapes_of_large_matrices_on_the_meta_device(function, learned):
    tensors = [None if t is None else t.to("meta") for t in factors(256, 300, learned=learned)]
    assert functional_matrix(*tensors, function=function).shape == (256, 300)


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
@pytest.mark.parametrize("size", [(256, 512), (256, 256)])
def test_at_most_about_one_matrix_is_kept_for_the_backward_pass(function, learned, r, size):
    tensors = factors(*size, r=r, learned=learned, dtype=torch.float32)
    with Saved() as saved:
        F = functional_matrix(*tensors, function=function)
    assert saved.total < 1.25 * F.numel() * F.element_size()
    assert F.requires_grad
    if function != "shift":
        with Saved() as plain:
            formula(*tensors, function=function)
        assert plain.total > 9 * F.numel() * F.element_size()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("function", ["cosine", "power", "shift"])
@pytest.mark.parametrize("learned", [False, True])
def test_compiled_layers_are_as_exact(function, learned):
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    for rows, columns, spread in ((256, 384, 0.1), (128, 512, 0.3), (512, 256, 0.2)):
        layer, x = make_layer(rows, columns, "linear", function=function, train_omega=learned)
        spread_out(layer, size=1.0, spread=spread, balance=1.0, omega=(0.5, 10.0), seed=1)
        compile_functional_matrices(layer)
        assert_as_exact_as_autograd(layer, x)
    graphs = counted["unique_graphs"] - before
    assert graphs >= 1
    # Other values compile nothing again.
    spread_out(layer, size=2.0, spread=0.1, balance=1.0, omega=(0.5, 3.0), seed=2)
    assert_as_exact_as_autograd(layer, x)
    assert counted["unique_graphs"] - before == graphs
