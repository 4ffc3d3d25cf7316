"""Batches in which every sample goes through an adapter of its own: in evaluation, in training, and bad calls."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_models import PLAIN, UNET, adapter_parameters, close, funlora_layers, hooks, kinds, output
from torch import nn

from funlora_hf import FunLoraConfig, mixed_batch
from funlora_hf.tuner import FunLoraClassVector, FunLoraConv2d, FunLoraLinear


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


# Every part as the layer alone


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["conv", "linear", "embedding"]),
    names=st.lists(st.sampled_from(["x", "y", "z", "__base__"]), min_size=1, max_size=9),
    gradients=st.booleans(),
)
def test_each_part_equals_the_layer_alone_to_the_bit(kind, names, gradients):
    torch.manual_seed(0)
    base, layer_cls, x = {
        "conv": lambda: (nn.Conv2d(4, 6, 3, padding=1), FunLoraConv2d, torch.randn(len(names), 4, 7, 9)),
        "linear": lambda: (nn.Linear(4, 6), FunLoraLinear, torch.randn(len(names), 5, 4)),
        "embedding": lambda: (nn.Embedding(5, 6), FunLoraClassVector, torch.randint(5, (len(names),))),
    }[kind]()
    layer = layer_cls(base, "x", FunLoraConfig(init_weights=False))
    layer.update_layer("y", FunLoraConfig(init_weights=False, function="power", operation="mul-add"))
    layer.update_layer("z", FunLoraConfig(init_weights=False, function="identity"))
    layer.set_scale("z", 0.5)
    with torch.set_grad_enabled(gradients):
        with mixed_batch(layer, names):
            found = layer(x)
        for name in set(names):
            rows = [index for index, other in enumerate(names) if other == name]
            layer.enable_adapters(name != "__base__")
            layer.set_adapter([name] if name != "__base__" else ["x"])
            assert torch.equal(found[rows], layer(x[rows]))
