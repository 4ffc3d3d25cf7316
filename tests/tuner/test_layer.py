"""The layers: their output against torch's own functions with a weight computed in NumPy; start, dtype, merging."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from funlora_hf import FunLoraConfig
from funlora_hf.tuner import FunLoraClassVector, FunLoraConv2d, FunLoraLinear
from funlora_hf.tuner.functional import FUNCTIONS, OPERATIONS


CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "non-square": {"kernel_size": (3, 5), "padding": (1, 2)},
    "strides": {"kernel_size": 3, "stride": (2, 1), "padding": 1},
    "same": {"kernel_size": (3, 4), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilation": {"kernel_size": 3, "dilation": (2, 1), "padding": (2, 1)},
    "same dilation": {"kernel_size": 3, "dilation": 2, "padding": "same", "padding_mode": "reflect"},
    "reflect": {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": (5, 3), "padding": (2, 1), "stride": 2, "padding_mode": "circular"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4, "out_channels": 8},
    "groups strides reflect": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2, "padding_mode": "reflect"},
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
conv_cases = pytest.mark.parametrize("case", CONVOLUTIONS)
functions = pytest.mark.parametrize("function", FUNCTIONS)
operations = pytest.mark.parametrize("operation", OPERATIONS)


def make_conv(case, dtype=torch.float64):
    torch.manual_seed(0)
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, **CONVOLUTIONS[case]}).to(dtype)
    return conv.requires_grad_(False)


def make_linear(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return nn.Linear(4, 7, bias=bias).to(dtype).requires_grad_(False)


def images(dtype=torch.float64):
    return torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def wrap(base, adapter="default", seed=2, **config):
    torch.manual_seed(seed)
    layer_cls = {nn.Conv2d: FunLoraConv2d, nn.Linear: FunLoraLinear, nn.Embedding: FunLoraClassVector}[type(base)]
    return layer_cls(base, adapter, FunLoraConfig(**config))


def add(layer, adapter, seed=3, **config):
    torch.manual_seed(seed)
    layer.update_layer(adapter, FunLoraConfig(**config))


def numpy_matrix(layer, adapter, part=""):
    """F (or G) on the channels of the weight by the formulas of the method, from the layer's parameters."""
    config = layer.settings[adapter]

    def parameter(name):
        parameters = getattr(layer, f"funlora_{part}{name}")
        return parameters[adapter].detach().double().numpy() if adapter in parameters else None

    A, B, alpha, omega = (parameter(name) for name in ("A", "B", "alpha", "omega"))
    if config.function == "identity":
        F = A @ B
    else:
        terms = []
        for i in range(config.num_functions):
            if config.function == "shift":
                terms.append(np.roll(A, i, axis=0) @ np.roll(B, i, axis=1))
            elif config.function == "cosine":
                terms.append(np.cos((i + 1 if omega is None else omega[i]) * (A @ B)))
            elif omega is None:
                terms.append((A @ B) ** (i + 1))
            else:
                terms.append(np.sign(A @ B) * np.abs(A @ B) ** omega[i])
        F = sum(a * term for a, term in zip(alpha, terms, strict=True)) / config.num_functions
    rows, columns = layer.weight.shape[:2]
    F = F.repeat(config.ratio, axis=0).repeat(config.ratio, axis=1)[:rows, :columns]
    return F.reshape(rows, columns, *(1 for _ in layer.weight.shape[2:]))


def numpy_weight(layer, adapters=("default",)):
    """W0 * F, W0 + F or W0 * F + G; of several adapters the factors multiply and the terms sum."""
    weight = layer.get_base_layer().weight.detach().double().numpy().copy()
    for name in adapters:
        if layer.settings[name].operation != "add":
            weight = weight * numpy_matrix(layer, name)
    for name in adapters:
        operation = layer.settings[name].operation
        if operation != "mul":
            weight = weight + numpy_matrix(layer, name, "add_" if operation == "mul-add" else "")
    return torch.from_numpy(weight).to(layer.weight.dtype)


def plain_output(base, x, weight):
    """The base's operation with another weight, by torch's functions."""
    if isinstance(base, nn.Linear):
        return nn.functional.linear(x, weight, base.bias)
    padding = base.padding
    if base.padding_mode != "zeros":
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(base.dilation, base.kernel_size, strict=True)]
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            sides = [(p, p) for p in padding]
        (top, bottom), (left, right) = sides
        x, padding = nn.functional.pad(x, (left, right, top, bottom), mode=base.padding_mode), 0
    return nn.functional.conv2d(x, weight, base.bias, base.stride, padding, base.dilation, base.groups)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# What a layer computes


@conv_cases
@operations
def test_conv_equals_plain_convolution_with_the_adapted_weight(case, operation):
    layer = wrap(make_conv(case), operation=operation, init_weights=False)
    x = images()
    close(layer(x), plain_output(layer.base_layer, x, numpy_weight(layer)), 1e-10)
    assert (layer(x) - layer.base_layer(x)).abs().max() > 1e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(list(CONVOLUTIONS)),
    function=st.sampled_from(FUNCTIONS),
    operation=st.sampled_from(OPERATIONS),
    train_omega=st.booleans(),
    p=st.integers(1, 6),
    r=st.integers(1, 3),
    ratio=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_conv_for_any_configuration(case, function, operation, train_omega, p, r, ratio, seed):
    config = {"function": function, "operation": operation, "train_omega": train_omega, "num_functions": p}
    layer = wrap(make_conv(case), seed=seed, r=r, ratio=ratio, init_weights=False, **config)
    x = images()
    close(layer(x), plain_output(layer.base_layer, x, numpy_weight(layer)), 1e-8)


@functions
@operations
@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4), (4,)])
def test_linear_equals_plain_linear_with_the_adapted_weight(function, operation, shape):
    layer = wrap(make_linear(), function=function, operation=operation, r=2, ratio=3, init_weights=False)
    x = torch.randn(*shape, dtype=torch.float64)
    close(layer(x), plain_output(layer.base_layer, x, numpy_weight(layer)), 1e-10)


class WeightGradients(TorchDispatchMode):
    """Counts the convolutions whose backward makes a gradient of the weight."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.count += args[-1][1]
        return func(*args, **(kwargs or {}))


@conv_cases
@pytest.mark.parametrize("ratio", [1, 3])
def test_training_the_plain_product_needs_no_gradient_of_the_weight(case, ratio, monkeypatch):
    monkeypatch.setattr("funlora_hf.tuner.layer.SMALLEST_SIZE", 0)
    layer = wrap(make_conv(case), function="identity", ratio=ratio, init_weights=False)
    x = images().requires_grad_()
    expected = plain_output(layer.base_layer, x, numpy_weight(layer))
    inputs = [x, layer.funlora_A["default"], layer.funlora_B["default"]]

    def gradients(output):
        return torch.autograd.grad((output * torch.cos(output.detach())).sum(), inputs)

    with WeightGradients() as made:
        output = layer(x)
        found = gradients(output)
    close(output, expected, 1e-10)
    grouped = layer.base_layer.groups > 1
    assert made.count == (1 if grouped else 0)
    # The weight-multiplying form, at a size that is too small for the other.
    monkeypatch.setattr("funlora_hf.tuner.layer.SMALLEST_SIZE", 10**9)
    with WeightGradients() as made:
        plain = gradients(layer(x))
    assert made.count == 1
    for own, other in zip(found, plain, strict=True):
        close(own, other, 1e-9)


def test_training_the_plain_product_of_a_linear_layer(monkeypatch):
    monkeypatch.setattr("funlora_hf.tuner.layer.SMALLEST_SIZE", 0)
    layer = wrap(make_linear(), function="identity", init_weights=False)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    output = layer(x)
    close(output, plain_output(layer.base_layer, x, numpy_weight(layer)), 1e-10)
    output.sum().backward()
    A, B = layer.funlora_A["default"], layer.funlora_B["default"]
    weight, inputs = layer.base_layer.weight.detach(), x.reshape(-1, 4)
    close(A.grad[:, 0], (inputs * B.detach() @ weight.T).sum(0), 1e-10)
    close(B.grad[0], (A.detach() * weight).sum(0) * inputs.sum(0), 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_the_plain_product_keeps_the_dtype(dtype, monkeypatch):
    monkeypatch.setattr("funlora_hf.tuner.layer.SMALLEST_SIZE", 0)
    layer = wrap(make_conv("3x3", dtype), function="identity", init_weights=False)
    x = images(dtype)
    output = layer(x)
    assert output.dtype == dtype
    close(output, plain_output(layer.base_layer, x, numpy_weight(layer)), 0.05)


@pytest.mark.parametrize("change", [{"function": "cosine"}, {"operation": "add"}, {"r": 2}, "scale", "two"])
def test_other_adapters_multiply_the_weight(change, monkeypatch):
    monkeypatch.setattr("funlora_hf.tuner.layer.SMALLEST_SIZE", 0)
    config = {"function": "identity", "init_weights": False}
    layer = wrap(make_conv("3x3"), **{**config, **(change if isinstance(change, dict) else {})})
    names = ["default"]
    if change == "scale":
        layer.set_scale("default", 0.5)
        expected = (layer.base_layer.weight + numpy_weight(layer)) / 2
    else:
        if change == "two":
            add(layer, "other", **config)
            names.append("other")
            layer.set_adapter(names)
        expected = numpy_weight(layer, names)
    with WeightGradients() as made:
        output = layer(images())
        output.sum().backward()
    close(output, plain_output(layer.base_layer, images(), expected), 1e-10)
    assert made.count == 1


def test_linear_without_bias():
    layer = wrap(make_linear(bias=False), init_weights=False)
    x = torch.randn(3, 4, dtype=torch.float64)
    close(layer(x), x @ numpy_weight(layer).T, 1e-10)


@operations
def test_float32_is_accurate(operation):
    layer = wrap(make_conv("3x3", torch.float32), operation=operation, init_weights=False)
    x = images(torch.float32)
    close(layer(x), plain_output(layer.base_layer, x, numpy_weight(layer)), 1e-5)


@operations
def test_delta_weight(operation):
    layer = wrap(make_conv("groups"), operation=operation, init_weights=False)
    delta = layer.get_delta_weight("default")
    assert delta.shape == layer.weight.shape
    close(delta, numpy_weight(layer) - layer.weight, 1e-10)


def test_learned_omega_is_used():
    layer = wrap(make_conv("3x3"), init_weights=False)
    with torch.no_grad():
        layer.funlora_omega["default"].mul_(1.3)
    x = images()
    close(layer(x), plain_output(layer.base_layer, x, numpy_weight(layer)), 1e-10)


# Parameters


@pytest.mark.parametrize("train_omega", [True, False])
@functions
@operations
def test_parameters_are_those_that_the_function_uses(function, operation, train_omega):
    layer = wrap(make_conv("groups"), function=function, operation=operation, train_omega=train_omega, r=2, ratio=4)
    names = {"A", "B"}
    if function != "identity":
        names |= {"alpha"}
    if function in ("cosine", "power") and train_omega:
        names |= {"omega"}
    expected = {f"funlora_{name}.default" for name in names}
    if operation == "mul-add":
        expected |= {f"funlora_add_{name}.default" for name in names}
    parameters = {name: p for name, p in layer.named_parameters() if "base_layer" not in name}
    assert set(parameters) == expected
    shapes = {"A": (2, 2), "B": (2, 1), "alpha": (10,), "omega": (10,)}  # 6 -> 2 rows; 4 / 2 groups -> 1 column
    for name, parameter in parameters.items():
        assert parameter.shape == shapes[name.split(".")[0].removeprefix("funlora_").removeprefix("add_")]
        assert parameter.requires_grad


def test_adding_again_under_the_same_name_starts_anew():
    layer = wrap(make_conv("3x3"), operation="mul-add", init_weights=False)
    layer.set_scale("default", 0.5)
    layer.update_layer("default", FunLoraConfig(function="shift", num_functions=3))
    assert layer.scaling == {"default": 1}
    parameters = {name for name, _ in layer.named_parameters() if "base_layer" not in name}
    assert parameters == {"funlora_A.default", "funlora_B.default", "funlora_alpha.default"}
    x = images()
    close(layer(x), layer.base_layer(x), 1e-6)


def test_adding_another_adapter_does_not_activate_it():
    layer = wrap(make_conv("3x3"), "a", init_weights=False)
    x = images()
    expected = layer(x)
    add(layer, "b", init_weights=False)
    assert layer.active_adapters == ["a"]
    assert torch.equal(layer(x), expected)
    assert layer.funlora_A["a"].requires_grad
    assert not layer.funlora_A["b"].requires_grad


# The start


@functions
@operations
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_starts_as_the_identity(function, operation, r, ratio):
    config = {"function": function, "operation": operation, "r": r, "ratio": ratio}
    for base, x in (
        (make_conv("3x3", torch.float32), images(torch.float32)),
        (make_conv("groups", torch.float32), images(torch.float32)),
        (make_linear(torch.float32), torch.randn(5, 4)),
    ):
        assert (wrap(base, **config)(x) - base(x)).abs().max() <= 1e-6


@functions
@operations
def test_without_init_weights_it_differs(function, operation):
    base, x = make_conv("3x3", torch.float32), images(torch.float32)
    difference = wrap(base, function=function, operation=operation, init_weights=False)(x) - base(x)
    assert 1e-3 < difference.abs().max() < 100


# dtypes


@functions
@operations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base(function, operation, dtype):
    for base, x in (
        (make_conv("3x3", dtype), images(dtype)),
        (make_linear(dtype), torch.randn(5, 4).to(dtype)),
    ):
        layer = wrap(base, function=function, operation=operation)
        for name, parameter in layer.named_parameters():
            assert parameter.dtype == (dtype if "base_layer" in name else torch.float32), name
        output = layer(x)
        assert output.dtype == dtype
        # F is 1 or 0 within float32, so that the product rounds back to the weight itself
        assert torch.equal(output, base(x))


def test_low_precision_weight_is_rounded_once():
    layer = wrap(make_conv("3x3", torch.bfloat16), operation="mul-add", init_weights=False)
    delta = layer.adapted_weight(["default"], layer.weight).float() - numpy_weight(layer).float()
    # numpy_weight rounds the exact weight to bfloat16 once; one unit in the last place where float32 falls otherwise
    assert (delta != 0).double().mean() < 0.01
    assert (delta.abs() / layer.weight.float().abs().max()).max() < 2**-7


def test_autocast_computes_the_weight_in_float32():
    layer = wrap(make_conv("3x3", torch.float32), r=3, init_weights=False)
    expected = layer.adapted_weight(["default"], layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.adapted_weight(["default"], layer.weight), expected)
        assert layer(images(torch.float32)).dtype == torch.bfloat16


# Several adapters


def test_several_active_adapters_multiply_and_sum():
    layer = wrap(make_conv("3x3"), "a", operation="mul", init_weights=False)
    add(layer, "b", operation="add", function="shift", init_weights=False)
    add(layer, "c", operation="mul-add", function="power", init_weights=False)
    add(layer, "d", operation="mul", function="identity", init_weights=False)
    x = images()
    for active in (["a", "d"], ["a", "b"], ["b", "a"], ["b", "c"], ["d", "c", "b", "a"]):
        layer.set_adapter(active)
        close(layer(x), plain_output(layer.base_layer, x, numpy_weight(layer, active)), 1e-9)


# Scale


def scaled_weight(layer, scales):
    """`numpy_weight` with a scale for every adapter: 1 + s (F - 1) for factors, s G for terms."""
    weight = layer._base_weight().detach().double().numpy()
    for name, scale in scales.items():
        if layer.settings[name].operation != "add":
            weight = weight * (1 + scale * (numpy_matrix(layer, name) - 1))
    for name, scale in scales.items():
        operation = layer.settings[name].operation
        if operation != "mul":
            weight = weight + scale * numpy_matrix(layer, name, "add_" if operation == "mul-add" else "")
    return torch.from_numpy(weight)


@conv_cases
@operations
def test_scale_of_one_adapter(case, operation):
    layer, x = wrap(make_conv(case), operation=operation, init_weights=False), images()
    for scale in (0.25, -1, 3):
        layer.set_scale("default", scale)
        weight = scaled_weight(layer, {"default": scale})
        close(weight, layer.weight + scale * (numpy_weight(layer) - layer.weight), 1e-10)
        close(layer(x), plain_output(layer.base_layer, x, weight), 1e-9)
    layer.set_scale("default", 0)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_scales_of_several_adapters_act_on_each():
    layer = wrap(make_conv("3x3"), "a", operation="mul", init_weights=False)
    add(layer, "b", operation="add", function="shift", init_weights=False)
    add(layer, "c", operation="mul-add", function="power", init_weights=False)
    scales, x = {"a": 0.5, "b": 2.0, "c": -0.3}, images()
    layer.set_adapter(list(scales))
    for name, scale in scales.items():
        layer.set_scale(name, scale)
    expected = plain_output(layer.base_layer, x, scaled_weight(layer, scales))
    close(layer(x), expected, 1e-9)
    layer.merge()
    close(layer(x), expected, 1e-9)


def test_scale_of_a_class_vector():
    base, labels = nn.Embedding(2, 5).to(torch.float64), torch.tensor([1, 0, 1])
    layer = wrap(base, "a", init_weights=False)
    add(layer, "b", init_weights=False)
    a, b = (layer.funlora_class_vector[name].detach() for name in "ab")
    rows = base.weight.detach()[labels]
    layer.set_scale("a", 0.25)
    expected = 0.75 * rows + 0.25 * a
    close(layer(labels), expected, 1e-12)
    layer.set_adapter(["a", "b"])
    close(layer(labels), (expected + b) / 2, 1e-12)
    layer.merge()
    close(layer(labels), (expected + b) / 2, 1e-12)
    layer.unmerge()
    layer.set_adapter(["a"])
    layer.set_scale("a", 0)
    close(layer(labels), rows, 1e-12)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_merged_weights_follow_the_scale_and_come_back():
    layer = wrap(make_conv("3x3"), "a", init_weights=False)
    add(layer, "b", init_weights=False)
    before = layer.weight.detach().clone()
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"])
    merged = layer.weight.detach().clone()
    layer.set_scale("b", 0.5)
    assert layer.merged_adapters == ["a", "b"]
    close(layer.weight.data, scaled_weight(layer, {"a": 1, "b": 0.5}), 1e-10)
    layer.set_scale("b", 1)
    assert torch.equal(layer.weight, merged)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_another_scale_of_an_adapter_that_is_not_merged_leaves_the_merged_weight_alone():
    layer = wrap(make_conv("3x3"), "a", init_weights=False)
    add(layer, "b", init_weights=False)
    layer.merge()
    merged = layer.weight.detach().clone()
    layer.set_scale("b", 0.5)
    assert torch.equal(layer.weight, merged)
    assert layer.merged_adapters == ["a"]


# Merging


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("kind", ["conv", "linear", "embedding"])
@operations
def test_merge_and_unmerge(kind, operation):
    base = {
        "conv": lambda: make_conv("groups", torch.float32),
        "linear": lambda: make_linear(torch.float32),
        "embedding": lambda: nn.Embedding(3, 4),
    }[kind]()
    x = {"conv": images(torch.float32), "linear": torch.randn(3, 4), "embedding": torch.tensor([2, 0])}[kind]
    layer = wrap(base, "a", operation=operation, init_weights=False)
    add(layer, "b", operation=operation, init_weights=False)
    before = base.weight.detach().clone()
    state = {name: value.clone() for name, value in layer.state_dict().items()}

    layer.set_adapter(["a", "b"])
    expected = layer(x)
    for steps in ([["a"], ["b"]], [["a", "b"]], [None]):  # one after the other, both at once, the active ones
        for names in steps:
            layer.merge(adapter_names=names)
        assert layer.merged_adapters == ["a", "b"]
        assert not torch.equal(base.weight, before)
        assert torch.equal(layer(x), expected)
        assert set(layer.state_dict()) == set(state)  # the kept weight is not saved

        layer.unmerge()
        assert not layer.merged
        assert torch.equal(layer(x), expected)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, state[name])
    assert torch.equal(base.weight, before)


def test_merge_again_or_without_the_adapter_does_nothing():
    layer = wrap(make_conv("3x3"), "a", init_weights=False)
    before = layer.weight.detach().clone()
    layer.merge(adapter_names=["no_such_adapter"])
    assert not layer.merged
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    layer.merge()
    merged = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="already"):
        layer.merge()
    assert torch.equal(layer.weight, merged)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_merging_again_takes_the_weight_of_that_time():
    layer = wrap(make_conv("3x3"), init_weights=False)
    layer.merge()
    layer.unmerge()
    layer.weight.data = 2 * layer.weight.data
    expected = numpy_weight(layer)
    layer.merge()
    close(layer.weight.data, expected, 1e-10)


def test_delta_weight_of_a_merged_layer_is_that_of_the_original():
    layer = wrap(make_conv("3x3"), init_weights=False)
    expected = layer.get_delta_weight("default")
    layer.merge()
    assert torch.equal(layer.get_delta_weight("default"), expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_merged_layer_unmerge_exactly(copier):
    layer = wrap(make_conv("3x3", torch.float32), init_weights=False)
    with torch.no_grad():
        layer.funlora_alpha["default"][:] = 0  # W * 0 cannot be divided back
    before = layer.weight.detach().clone()
    layer.merge()
    assert not layer.weight.any()
    other = copier(layer)
    other.unmerge()
    assert torch.equal(other.weight, before)
    assert layer.merged
    assert not layer.weight.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(value):
    layer = wrap(make_conv("3x3"), "a", init_weights=False)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.funlora_alpha["a"][0] = value
    with pytest.raises(ValueError, match="a seems to be broken"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        layer.funlora_alpha["a"][0] = 1
    layer.merge(safe_merge=True)
    assert layer.merged


def test_disabling_a_merged_layer_gives_the_base():
    base, x = make_conv("3x3"), images()
    expected = base(x)
    layer = wrap(base, init_weights=False)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)


# The class vector


def test_class_vector_starts_at_the_mean_of_the_rows():
    base = nn.Embedding(3, 5)
    layer = wrap(base)
    labels = torch.tensor([0, 1, 2])
    expected = base.weight.detach().double().numpy().mean(axis=0)
    np.testing.assert_allclose(layer(labels).detach().numpy(), np.tile(expected, (3, 1)), atol=1e-6)
    assert not np.allclose(wrap(base, init_weights=False)(labels).detach().numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [5, 1000, -1, 7]])
def test_class_vector_ignores_the_label(labels):
    layer = wrap(nn.Embedding(2, 5), init_weights=False)
    output = layer(torch.tensor(labels))
    assert output.shape == (4, 5)
    for row in output:
        assert torch.equal(row, layer.funlora_class_vector["default"])


def test_class_vectors_of_active_adapters_average():
    layer = wrap(nn.Embedding(2, 5), "a", init_weights=False)
    add(layer, "b", init_weights=False)
    layer.set_adapter(["a", "b"])
    a, b = (layer.funlora_class_vector[name].detach() for name in "ab")
    assert not torch.allclose(a, b)
    close(layer(torch.tensor([1]))[0], (a + b) / 2, 1e-6)


def test_disabled_class_vector_gives_the_rows_of_the_base():
    base = nn.Embedding(2, 5)
    layer = wrap(base, init_weights=False)
    layer.enable_adapters(False)
    assert torch.equal(layer(torch.tensor([1, 0])), base.weight[[1, 0]])


def test_class_vector_on_a_low_precision_base():
    base = nn.Embedding(3, 5).to(torch.bfloat16)
    layer = wrap(base)
    assert layer.funlora_class_vector["default"].dtype == torch.float32
    assert layer(torch.tensor([0])).dtype == torch.bfloat16
    np.testing.assert_allclose(
        layer.funlora_class_vector["default"].detach().numpy(),
        base.weight.detach().double().numpy().mean(0),
        rtol=1e-5,
    )
