"""Training with adapters: which parameters get gradients, gradient checkpointing, low precision, several processes."""

import itertools
import sys

import pytest
import torch
import torch.multiprocessing as multiprocessing
from peft_models import (
    KINDS,
    adapter_parameters,
    assert_equal,
    base_weights,
    differ,
    funlora_layers,
    kinds,
    output,
)
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from funlora_hf.tuner import FunLoraClassVector
from funlora_hf.tuner.functional import FUNCTIONS, OPERATIONS


def loss(kind, model, inputs):
    result = output(model(**inputs))
    target = torch.randn(result.shape, generator=torch.Generator().manual_seed(4))
    return (result.float() - target).square().mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Gradients


@kinds
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("operation", ["mul", "mul-add"])
def test_gradient_reaches_every_parameter_of_the_adapter_and_none_of_the_base(kind, function, operation):
    model = kind.model(init_weights=True, function=function, operation=operation).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = base_weights(model)
    # At the start G of "mul-add" is 0 and the exponents of A B = 1 have no gradient: alpha moves first, then A and B.
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loss(kind, model, kind.batch()).backward()
    for name, parameter in model.named_parameters():
        if "funlora_" in name:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    assert_equal(base_weights(model), before)


@kinds
def test_modules_to_save_are_trained(kind):
    model = kind.model(modules_to_save=[kind.whole]).train()
    kept = {f"base_model.model.{kind.whole}.modules_to_save.default.{name}" for name in ("weight", "bias")}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model)) | kept
    original = {name: p.clone() for name, p in model.named_parameters() if "original_module" in name}
    loss(kind, model, kind.batch()).backward()
    assert set(gradients(model)) == trainable
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert original
    assert_equal({name: p for name, p in model.named_parameters() if name in original}, original)


@kinds
@pytest.mark.parametrize("operation", ["mul", "mul-add"])
def test_gradient_checkpointing_changes_no_gradient(kind, operation):
    plain = kind.model(operation=operation).train()
    loss(kind, plain, kind.batch()).backward()
    checkpointed = kind.model(operation=operation).train()
    checkpointed.base_model.model.enable_gradient_checkpointing()
    passes = []
    for layer in funlora_layers(checkpointed):
        # Before the layer: its end is not reached again where nothing behind it is needed for the gradient.
        layer.register_forward_pre_hook(lambda *_: passes.append(1))
    loss(kind, checkpointed, kind.batch()).backward()
    assert len(passes) > len(funlora_layers(checkpointed))  # layers ran again in the backward pass
    assert_equal(gradients(checkpointed), gradients(plain))
    assert len(gradients(plain)) == len(adapter_parameters(plain))


# Low precision


def distance_from_identity(model):
    """The largest entry of F - 1, or of F for "add" and for the G of "mul-add", over all layers."""
    distances = []
    for layer in funlora_layers(model):
        if isinstance(layer, FunLoraClassVector):
            continue
        operation = layer.settings["default"].operation
        F = layer.functional_matrix("default")
        assert F.dtype == torch.float32
        distances.append((F - (0.0 if operation == "add" else 1.0)).abs().max().item())
        if operation == "mul-add":
            distances.append(layer.functional_matrix("default", "add_").abs().max().item())
    return max(distances)


@kinds
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bfloat16_base(kind, function, operation):
    base = kind.base().to(torch.bfloat16)
    inputs = {k: v if k == "class_labels" else v.to(torch.bfloat16) for k, v in kind.batch().items()}
    expected = kind.run(base, inputs)
    model = kind.model(base=base, init_weights=True, class_embedding=None, function=function, operation=operation)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert distance_from_identity(model) <= 1e-6
    actual = kind.run(model, inputs)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@kinds
def test_training_on_a_bfloat16_base(kind):
    model = kind.model(base=kind.base().to(torch.bfloat16)).train()
    inputs = {k: v if k == "class_labels" else v.to(torch.bfloat16) for k, v in kind.batch().items()}
    loss(kind, model, inputs).backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@kinds
@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast(kind, function):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distance_from_identity(kind.model(init_weights=True, function=function, r=3)) <= 1e-6
    model = kind.model(function=function, r=3)
    full = {
        layer: layer.functional_matrix("default") for layer in funlora_layers(model) if hasattr(layer, "funlora_A")
    }
    expected = kind.run(model)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer, F in full.items():
            assert torch.equal(layer.functional_matrix("default"), F)
        result = output(model(**kind.batch()))
        # Convolutions and linear layers ran in bfloat16, of which the output tells.
        assert result.dtype == torch.bfloat16 or differ(result, expected)
        loss(kind, model, kind.batch()).backward()
    torch.testing.assert_close(result.float(), expected, rtol=0.1, atol=0.1)
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name


# Several processes


def _train_half_a_batch(rank, store, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {}
    for kind, static_graph in itertools.product(KINDS, (False, True)):
        model = kind.model("x", "y").train()
        wrapped = DistributedDataParallel(model, find_unused_parameters=False, static_graph=static_graph)
        half = {name: value[2 * rank : 2 * rank + 2] for name, value in kind.batch(4).items()}
        for _ in range(2):  # a static graph is learned in the first pass and used from the second on
            model.zero_grad()
            output(wrapped(**half)).square().mean().backward()
        results[kind.name, static_graph] = gradients(model)
    torch.save(results, f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path, monkeypatch):
    """Two processes with half a batch each get the gradients of one with all of it, and only those of the adapter."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    multiprocessing.spawn(_train_half_a_batch, (tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    for kind, static_graph in itertools.product(KINDS, (False, True)):
        model = kind.model("x", "y").train()
        output(model(**kind.batch(4))).square().mean().backward()
        expected, actual = gradients(model), first[kind.name, static_graph]
        assert set(expected) == set(adapter_parameters(model, "x"))  # neither the base's nor the other adapter's
        assert_equal(actual, second[kind.name, static_graph])
        assert set(actual) == set(expected)
        for name, value in actual.items():
            scale = expected[name].abs().max().item()
            assert scale > 0
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
