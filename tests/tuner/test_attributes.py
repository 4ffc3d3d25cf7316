"""What PEFT and diffusers read on a LoRA layer is there on ours, or left out for a reason."""

import inspect

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from funlora_hf import FunLoraConfig


LEFT_OUT = {
    "factors under other names": {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_bias"},
    "FunLoRA has no such setting": {
        "lora_alpha",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "ephemeral_gpu_offload",
        "fan_in_fan_out",
        "is_target_conv_1d_layer",
        "conv_fn",
        "kwargs",
    },
    "variants of LoRA (DoRA and others)": {
        "lora_magnitude_vector",
        "lora_variant",
        "lora_variants",
        "resolve_lora_variant",
    },
    "starts of LoRA's factors; ours are in `initial_parameters`": {
        "reset_lora_parameters",
        "loftq_init",
        "olora_init",
        "pissa_init",
        "corda_init",
        "mica_init",
        "lora_ga_init",
        "orthogonal_init",
    },
}


def layer_of(base, config):
    return get_peft_model(nn.Sequential(base), config).base_model.model[0]


def public(layer):
    return {name for name in dir(layer) if not name.startswith("_")}


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 4, 3), lambda: nn.Linear(4, 4)], ids=["conv", "linear"])
def test_public_attributes_of_a_lora_layer(make):
    lora = layer_of(make(), LoraConfig(target_modules=["0"]))
    ours = layer_of(make(), FunLoraConfig(target_modules=["0"]))
    left_out = set().union(*LEFT_OUT.values())
    assert public(lora) - public(ours) <= left_out
    assert not left_out & public(ours)
    for name in public(lora) & public(ours):
        if inspect.ismethod(getattr(lora, name)):
            own, theirs = (inspect.signature(getattr(layer, name)).parameters for layer in (ours, lora))
            if name not in ("forward", "update_layer"):
                assert list(own)[: len(theirs)] == list(theirs) or "args" in own, name


def test_what_they_hold():
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3)), FunLoraConfig(target_modules=["0"], r=3), "x")
    model.add_adapter("y", FunLoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    assert isinstance(layer, BaseTunerLayer)
    assert layer.r == {"x": 3, "y": 1}
    assert layer.scaling == {"x": 1.0, "y": 1.0}
    assert layer.cast_input_dtype_enabled is True
    assert layer.supports_lora_conversion("x") is False
    model.delete_adapter("y")
    assert layer.r == {"x": 3}
