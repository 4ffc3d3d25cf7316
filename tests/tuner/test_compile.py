"""torch.compile: no graph breaks, the same numbers, and one compilation for any number of classes swapped in."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft_models import CONDITION_UNET, PLAIN, UNET, adapter_parameters, adapter_state, close, differ, funlora_layers
from torch._dynamo.testing import CompileCounter

from funlora_hf import hotswap_adapter, mixed_batch
from funlora_hf.tuner.functional import FUNCTIONS, OPERATIONS


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    """The model compiled without graph breaks, by a backend that counts how often; what runs is torch's own code."""
    counter = CompileCounter()
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_graph_for_every_function_and_operation(function, operation):
    model = PLAIN.model(function=function, operation=operation, r=2, ratio=2)
    fast, counter = compiled(model)
    close(PLAIN.run(fast), PLAIN.run(model))
    close(PLAIN.run(fast, PLAIN.batch(seed=9)), PLAIN.run(model, PLAIN.batch(seed=9)))
    assert counter.frame_count == 1


def test_one_graph_for_a_unet_with_attention():
    small = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        num_class_embeds=2,
    )
    model = CONDITION_UNET.model(base=small, operation="mul-add")
    fast, counter = compiled(model)
    close(CONDITION_UNET.run(fast), CONDITION_UNET.run(model))
    assert counter.frame_count == 1


def test_gradients():
    """Traced through autograd as for inductor, which itself would take a C++ compiler half a minute."""
    model = PLAIN.model(operation="mul-add").train()
    gradients = []
    for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        run(**PLAIN.batch()).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    actual, expected = gradients
    assert set(actual) == set(expected) == set(adapter_parameters(model))
    for name, value in actual.items():
        close(value, expected[name], 1e-4)


@pytest.mark.parametrize("kind", [UNET, PLAIN], ids=lambda kind: kind.name)
def test_any_number_of_classes_is_compiled_once(kind):
    model = kind.model()
    fast, counter = compiled(model)
    outputs = []
    for seed in range(20):
        other = kind.model(seed=seed)
        hotswap_adapter(fast, adapter_state(other))
        outputs.append(kind.run(fast))
        close(outputs[-1], kind.run(other))
    assert counter.frame_count == 1
    assert all(differ(one, another) for one, another in itertools.pairwise(outputs))


def test_switching_adapters_compiles_anew_and_stays_right():
    """What hotswap_adapter saves; the numbers are right in any case."""
    model = PLAIN.model("x", "y", "z")
    fast, counter = compiled(model)
    for name in "xyz":
        model.set_adapter(name)
        close(PLAIN.run(fast), PLAIN.run(model))
    assert counter.frame_count == 3


def test_what_changes_after_compiling_takes_effect():
    model = PLAIN.model("x", "y")
    fast, _ = compiled(model.base_model.model)

    def check():
        close(PLAIN.run(fast), PLAIN.run(model.base_model.model), 1e-4)

    check()
    model.base_model.set_adapter(["x", "y"])
    check()
    for layer in funlora_layers(model):
        layer.set_scale("x", 0.5)
    check()
    model.merge_adapter(["x", "y"])
    check()
    model.unmerge_adapter()
    check()
    with model.disable_adapter():
        close(PLAIN.run(fast), PLAIN.run(PLAIN.base()), 1e-4)
    check()


def test_mixed_batches():
    model = PLAIN.model("x", "y")
    fast = torch.compile(model.base_model.model, backend="eager")
    inputs, names = PLAIN.batch(5), ["x", "__base__", "y", "y", "x"]
    for order in (names, names[::-1], ["y"] * 5):
        with mixed_batch(model, order):
            close(PLAIN.run(fast, inputs), PLAIN.run(model.base_model.model, inputs))
    close(PLAIN.run(fast, inputs), PLAIN.run(model, inputs))
