"""hotswap_adapter: another class's values in a live adapter, in place, or nothing at all."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft_models import (
    CONDITION_UNET,
    PLAIN,
    UNET,
    adapter_state,
    assert_equal,
    base_weights,
    differ,
    funlora_layers,
    kinds,
)
from safetensors.torch import load_file

from funlora_hf import hotswap_adapter


def modules(model):
    return {name: id(p) for name, p in model.named_parameters()}


@kinds
@pytest.mark.parametrize("config", [{}, {"operation": "mul-add", "train_omega": False}, {"function": "shift", "r": 2}])
def test_the_live_adapter_becomes_the_other(kind, config, tmp_path):
    config = {**config, "modules_to_save": [kind.whole]}
    other = kind.model("class_3", seed=5, **config)
    with torch.no_grad():
        other.base_model.model.get_submodule(kind.whole).modules_to_save["class_3"].bias.add_(1)
    expected = kind.run(other)
    other.save_pretrained(tmp_path)
    model = kind.model(**config)
    before, identities = kind.run(model), modules(model)
    assert differ(before, expected)
    hotswap_adapter(model, load_file(tmp_path / "class_3" / "adapter_model.safetensors"))
    assert torch.equal(kind.run(model), expected)
    assert modules(model) == identities
    assert_equal(adapter_state(model), adapter_state(other, "class_3"))
    # ... and the file's tensors are not those of the model.
    hotswap_adapter(model, adapter_state(kind.model(**config)))
    assert torch.equal(kind.run(model), before)


@kinds
def test_only_the_named_adapter_changes(kind):
    model = kind.model("x", "y")
    state, weights, requires_grad = adapter_state(model, "x"), base_weights(model), trainable(model)
    hotswap_adapter(model, adapter_state(kind.model(seed=5)), adapter_name="y")
    assert_equal(adapter_state(model, "x"), state)
    assert_equal(base_weights(model), weights)
    assert trainable(model) == requires_grad
    model.set_adapter("y")
    assert torch.equal(kind.run(model), kind.run(kind.model(seed=5)))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@kinds
def test_any_layer_around_the_model_will_do(kind):
    model = kind.model()
    inner = model.base_model.model
    for seed, wrapped in enumerate((model, model.base_model, inner, torch.compile(model), torch.compile(inner)), 10):
        other = kind.model(seed=seed)
        hotswap_adapter(wrapped, adapter_state(other))
        assert torch.equal(kind.run(model), kind.run(other))
    # As set_peft_model_state_dict takes it for a model without PEFT's wrapper.
    bare = {key.removeprefix("base_model.model."): value for key, value in adapter_state(kind.model(seed=3)).items()}
    hotswap_adapter(model, bare)
    assert_equal(adapter_state(model), adapter_state(kind.model(seed=3)))


def test_an_adapter_around_a_compiled_model():
    model = PLAIN.model(base=torch.compile(PLAIN.base(), backend="eager"))
    other = PLAIN.model(seed=5)
    hotswap_adapter(model, adapter_state(other))
    assert torch.equal(PLAIN.run(model), PLAIN.run(other))


def test_training_goes_on_after_a_swap():
    model = PLAIN.model().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hotswap_adapter(model, adapter_state(PLAIN.model(seed=5)))
    model(**PLAIN.batch()).square().sum().backward()
    optimizer.step()
    trained = adapter_state(model)
    assert any(differ(value, trained[key]) for key, value in adapter_state(PLAIN.model(seed=5)).items())


def test_values_of_another_dtype_are_cast():
    other = adapter_state(PLAIN.model(seed=5))
    model = PLAIN.model()
    hotswap_adapter(model, {key: value.to(torch.bfloat16) for key, value in other.items()})
    for key, value in adapter_state(model).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, other[key].to(torch.bfloat16).float())


# Refusals


def spoiled(kind, **config):
    """A model, the name of its last layer, and the state of another adapter, to be spoiled."""
    model = kind.model(**config)
    names = [name for name, module in model.named_modules() if module in funlora_layers(model)]
    return model, names[-1], adapter_state(kind.model(seed=5, **config))


def refusal(kind, model, state, **kwargs):
    """The message with which a swap is refused; nothing may have changed."""
    before, output = adapter_state(model), kind.run(model)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the callers look at the message
        hotswap_adapter(model, state, **kwargs)
    assert_equal(adapter_state(model), before)
    assert torch.equal(kind.run(model), output)
    return str(raised.value)


@kinds
@pytest.mark.parametrize("part", ["funlora_A", "funlora_alpha"])
def test_missing_tensor(kind, part):
    model, layer, state = spoiled(kind)
    shape = tuple(state.pop(f"{layer}.{part}").shape)
    message = refusal(kind, model, state)
    assert f"{layer.removeprefix('base_model.model.')}.{part}: missing, expected a tensor of shape {shape}" in message


@kinds
def test_other_shape(kind):
    model, layer, state = spoiled(kind)
    found = state[f"{layer}.funlora_A"]
    state[f"{layer}.funlora_A"] = found[:-1]
    message = refusal(kind, model, state)
    assert f"funlora_A: found shape {tuple(found[:-1].shape)}, expected {tuple(found.shape)}" in message
    assert layer.removeprefix("base_model.model.") in message


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(kind, value):
    model, layer, state = spoiled(kind)
    state[f"{layer}.funlora_omega"][-1] = value
    message = refusal(kind, model, state)
    assert f"{layer.removeprefix('base_model.model.')}.funlora_omega: found NaN or infinity" in message


@pytest.mark.parametrize(("live", "given", "said"), [(True, False, "missing"), (False, True, "expected none")])
def test_a_frozen_omega_does_not_replace_a_learned_one_nor_the_other_way_round(live, given, said):
    message = refusal(UNET, UNET.model(train_omega=live), adapter_state(UNET.model(train_omega=given)))
    lines = [line for line in message.splitlines() if line.startswith("- up_blocks")]
    assert lines
    assert all("funlora_omega" in line and said in line for line in lines)


@pytest.mark.parametrize(
    "config",
    [
        {"function": "shift"},
        {"operation": "mul-add"},
        {"ratio": 2},
        {"num_functions": 4},
        {"target_modules": ["to_k"]},
    ],
)
def test_an_adapter_of_another_config(config):
    kind = CONDITION_UNET
    assert "do not fit adapter 'default'" in refusal(kind, kind.model(), adapter_state(kind.model(**config)))


def test_modules_to_save_belong_to_the_adapter():
    with_whole = PLAIN.model(modules_to_save=[PLAIN.whole])
    assert "head.weight: missing" in refusal(PLAIN, with_whole, adapter_state(PLAIN.model()))
    message = refusal(PLAIN, PLAIN.model(), adapter_state(with_whole))
    assert "head.weight: found a tensor of shape (4, 6), expected none" in message


@kinds
def test_merged_adapters_are_not_swapped(kind):
    model = kind.model("x", "y")
    state = adapter_state(kind.model(seed=5))
    model.merge_adapter(["x"])
    merged = base_weights(model)
    with pytest.raises(ValueError, match=r"'x'.*merged.*unmerge_adapter"):
        hotswap_adapter(model, state, adapter_name="x")
    assert_equal(base_weights(model), merged)
    hotswap_adapter(model, state, adapter_name="y")
    model.unmerge_adapter()
    hotswap_adapter(model, state, adapter_name="x")
    assert torch.equal(kind.run(model), kind.run(kind.model(seed=5)))


def test_unknown_adapter():
    message = refusal(PLAIN, PLAIN.model(), adapter_state(PLAIN.model()), adapter_name="class_7")
    assert message == "`adapter_name` is 'class_7', expected an adapter of the model: ['default']."


def test_an_adapter_of_another_method_is_not_ours_to_swap():
    model = get_peft_model(PLAIN.base(), LoraConfig(target_modules=["mlp.0"]))
    with pytest.raises(ValueError, match=r"expected an adapter of the model: \[\]"):
        hotswap_adapter(model, get_peft_model_state_dict(model))
