"""Batches in which every sample goes through an adapter of its own: in evaluation, in training, and bad calls."""

import itertools

import pytest
import torch
from peft_models import PLAIN, UNET, adapter_parameters, close, funlora_layers, hooks, kinds, output
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from funlora_hf import FunLoraConfig, mixed_batch
from funlora_hf.tuner import FunLoraConv2d


MIXES = [["x", "y", "__base__", "x", "y"], ["x", "y", "__base__"], ["y", "y", "x"], ["__base__"] * 3, ["y"] * 3]


def alone(kind, model, names, inputs):
    """Every sample by itself with its adapter switched on."""
    outputs = []
    for index, name in enumerate(names):
        sample = {key: value[index : index + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(kind.run(model, sample))
        else:
            model.set_adapter(name)
            outputs.append(kind.run(model, sample))
    return torch.cat(outputs)


@kinds
@pytest.mark.parametrize("names", MIXES, ids=["-".join(names) for names in MIXES])
@pytest.mark.parametrize("operation", ["mul", "mul-add"])
def test_mixed_batch_equals_each_sample_alone(kind, names, operation):
    model = kind.model("x", "y", operation=operation)
    inputs = kind.batch(len(names))
    close(kind.run(model, inputs, adapter_names=names), alone(kind, model, names, inputs), 1e-4)
    assert hooks(model) == 0


def test_mixed_batch_follows_any_order():
    model = PLAIN.model("x", "y", "z")
    inputs = PLAIN.batch(4)
    for names in itertools.permutations("xyzx"):
        close(PLAIN.run(model, inputs, adapter_names=list(names)), alone(PLAIN, model, names, inputs))


@kinds
def test_mixed_batch_with_modules_to_save(kind):
    model = kind.model("x", "y", modules_to_save=[kind.whole])
    with torch.no_grad():
        for factor, name in ((2, "x"), (3, "y")):
            model.base_model.model.get_submodule(kind.whole).modules_to_save[name].weight.mul_(factor)
    inputs, names = kind.batch(5), ["x", "y", "__base__", "x", "y"]
    close(kind.run(model, inputs, adapter_names=names), alone(kind, model, names, inputs), 1e-4)


@kinds
def test_mixed_batch_context_on_the_bare_model(kind):
    model = kind.model("x", "y")
    inputs, names = kind.batch(4), ["y", "__base__", "x", "y"]
    expected = alone(kind, model, names, inputs)
    base = model.base_model.model
    with mixed_batch(base, names):
        close(kind.run(base, inputs), expected, 1e-4)
    assert hooks(model) == 0


@kinds
def test_labels_matter_to_the_samples_of_the_base_alone(kind):
    model = kind.model("x", "y")
    inputs, names = kind.batch(3), ["x", "__base__", "y"]
    expected = kind.run(model, inputs, adapter_names=names)
    labels = torch.tensor([1000, 1 - inputs["class_labels"][1], -3])
    with_labels = kind.run(model, {**inputs, "class_labels": labels}, adapter_names=names)
    assert torch.equal(with_labels[[0, 2]], expected[[0, 2]])
    assert not torch.equal(with_labels[1], expected[1])


@kinds
def test_disabled_adapters_take_no_part(kind):
    model = kind.model("x", "y")
    inputs = kind.batch()
    with model.disable_adapter():
        assert torch.equal(kind.run(model, inputs, adapter_names=["x", "y", "x"]), kind.run(kind.base(), inputs))


@kinds
@pytest.mark.parametrize("names", [["x", "no_such_adapter", "y"], ["X", "x", "x"]])
def test_mixed_batch_refuses_unknown_names(kind, names):
    model = kind.model("x", "y")
    unknown = next(name for name in names if name not in "xy")
    with pytest.raises(ValueError, match=rf"Trying to infer with non-existing adapter\(s\): {unknown}"):
        kind.run(model, adapter_names=names)
    with pytest.raises(ValueError, match=unknown), mixed_batch(model, names):
        pass
    assert hooks(model) == 0


@kinds
@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_mixed_batch_refuses_another_length(kind, length):
    model = kind.model("x", "y")
    expected = kind.run(model)
    with pytest.raises(ValueError, match=rf"(?s)adapter_names.*{length} and 3"):
        kind.run(model, adapter_names=["y"] * length)
    assert hooks(model) == 0
    assert torch.equal(kind.run(model), expected)


@kinds
def test_mixed_batch_refuses_training_mode(kind):
    model = kind.model("x", "y").train()
    with pytest.raises(ValueError, match=r"training.*\n?.*mixed_batch"):
        kind.run(model, adapter_names=["x", "y", "x"])
    assert hooks(model) == 0


@kinds
def test_mixed_batch_refuses_merged_adapters(kind):
    model = kind.model("x", "y")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        kind.run(model, adapter_names=["x", "y", "x"])


def test_hooks_go_with_any_exception():
    model = UNET.model("x", "y")
    expected = UNET.run(model)

    def fail_inside():
        with mixed_batch(model, ["y", "y", "y"]):
            assert hooks(model) == len(funlora_layers(model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert hooks(model) == 0
    assert torch.equal(UNET.run(model), expected)


@kinds
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "checkpointing"])
def test_training_a_mixed_batch_sums_the_gradients_of_the_samples(kind, gradient_checkpointing):
    names, inputs = ["x", "y", "x", "x", "y"], kind.batch(5)
    target = torch.randn(kind.run(kind.base(), inputs).shape, generator=torch.Generator().manual_seed(4))

    def gradients(model):
        return {
            name: p.grad.clone()
            for adapter in "xy"
            for name, p in adapter_parameters(model, adapter).items()
            if p.grad is not None
        }

    model = kind.model("x", "y").train()
    for index, name in enumerate(names):
        model.set_adapter(name)
        sample = {key: value[index : index + 1] for key, value in inputs.items()}
        (output(model(**sample)) - target[index : index + 1]).square().sum().backward()
    expected = gradients(model)

    model = kind.model("x", "y").train()
    if gradient_checkpointing:
        model.base_model.model.enable_gradient_checkpointing()
    model.set_requires_grad(["x", "y"])
    with mixed_batch(model, names):
        (output(model(**inputs)) - target).square().sum().backward()
    actual = gradients(model)
    assert set(actual) == set(expected) == {n for a in "xy" for n in adapter_parameters(model, a)}
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max().item())
    assert not any(p.grad is not None for n, p in model.named_parameters() if "funlora_" not in n)


# One convolution in groups


class Convolutions(TorchDispatchMode):
    """Counts convolutions."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


CASES = {
    "plain": {"padding": 1},
    "no bias": {"padding": 1, "bias": False},
    "strides": {"stride": (2, 1), "padding": (1, 0)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "circular same": {"padding": "same", "padding_mode": "circular"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}


@pytest.mark.parametrize("case", CASES)
def test_small_convolutions_run_in_groups(case, monkeypatch):
    torch.manual_seed(0)
    base = nn.Conv2d(4, 6, 3, dtype=torch.float64, **CASES[case]).requires_grad_(False)
    layer = FunLoraConv2d(base, "x", FunLoraConfig(init_weights=False))
    layer.update_layer("y", FunLoraConfig(init_weights=False, function="power"))
    layer.set_adapter(["x", "y"])
    names = ["x", "__base__", "y", "y", "x", "__base__"]
    x = torch.randn(6, 4, 7, 9, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run(expected_count):
        with mixed_batch(layer, names), Convolutions() as made:
            result = layer(x)
        assert made.count == expected_count
        return [result, *torch.autograd.grad((result * result.detach().cos()).sum(), inputs)]

    found = run(1)
    monkeypatch.setattr("funlora_hf.tuner.layer.LARGEST_GROUPED", 0)
    for own, other in zip(found, run(3), strict=True):
        close(own, other, 1e-10)


@pytest.mark.parametrize(
    ("convolution", "names"),
    [
        pytest.param({"kernel_size": 3}, ["x", "y", "x"], id="other numbers of samples"),
        pytest.param({"kernel_size": 1}, ["x", "y"], id="1x1"),
        pytest.param({"kernel_size": 3, "groups": 2}, ["x", "y"], id="groups of its own"),
        pytest.param({"kernel_size": 3, "out_channels": 1024}, ["x", "y"], id="large"),
    ],
)
def test_other_convolutions_run_adapter_by_adapter(convolution, names):
    base = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, **convolution})
    layer = FunLoraConv2d(base, "x", FunLoraConfig(init_weights=False))
    layer.update_layer("y", FunLoraConfig(init_weights=False))
    with mixed_batch(layer, names), Convolutions() as made:
        layer(torch.randn(len(names), 4, 5, 5))
    assert made.count == 2
