"""The order of the layers of a U-Net, and those taken by default."""

from contextlib import nullcontext

import pytest
import torch
from backbones import CONDITION_VARIANTS, SMALL_VARIANTS, UNETS, build, executed
from peft import LoraConfig, PeftMixedModel, get_peft_model, inject_adapter_in_model
from text_to_image import component, make_pipeline, sample
from torch import nn

from funlora_hf import FunLoraConfig
from funlora_hf.tuner.targets import (
    FUSED_PROJECTIONS,
    conv_names,
    decoder,
    decoder_middle,
    knows_order,
    unet_conv_names,
)
from funlora_hf.tuner_base.wrappers import plain_modules, remove_adapters, without_peft


PROJECTIONS = {*FUSED_PROJECTIONS, *(part for parts in FUSED_PROJECTIONS.values() for part in parts)}
SMALL_UNETS = [*SMALL_VARIANTS, *(f"condition, {name}" for name in CONDITION_VARIANTS)]


def test_the_papers_cifar_backbone():
    unet = build("paper's cifar")
    # arXiv 2510.02631: 35.75M parameters with 10 classes
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_751_427
    assert len(unet_conv_names(unet)) == len(conv_names(unet)) == 65


@pytest.mark.parametrize("name", UNETS)
def test_names_are_in_order_of_execution(name):
    unet = build(name)
    assert knows_order(unet)
    assert unet_conv_names(unet) == executed(unet)


def test_attentions_of_a_block_alternate_with_its_resnets():
    order = unet_conv_names(build("condition, cross attention"))
    place = {name: order.index(f"down_blocks.0.{name}") for name in ("resnets.0.conv1", "attentions.0.proj_in")}
    assert place["resnets.0.conv1"] < place["attentions.0.proj_in"] < order.index("down_blocks.0.resnets.1.conv1")


def test_the_order_of_dual_attention_is_not_known():
    unet = build("condition, cross attention", dual_cross_attention=True)
    assert not knows_order(unet)


def test_the_order_of_other_models_is_not_known():
    assert not knows_order(nn.Sequential(nn.Conv2d(3, 3, 1)))
    unet = build("plain")
    unet.control = nn.Conv2d(3, 3, 1)
    assert not knows_order(unet)


def test_decoder_middle_of_cifar_is_40_to_54():
    unet = build("paper's cifar")
    assert decoder_middle(unet) == executed(unet)[40:55]
    assert decoder_middle(unet)[0] == "up_blocks.1.resnets.1.conv_shortcut"


def test_decoder_middle_of_imagenet_is_40_to_56():
    unet = build("paper's imagenet")
    names = executed(unet)
    assert len(names) == 67
    assert decoder_middle(unet) == names[40:57]


@pytest.mark.parametrize("name", SMALL_UNETS)
def test_decoder_middle_of_other_unets(name):
    unet = build(name)
    names, order = decoder_middle(unet), executed(unet)
    assert names
    whole = [name for name in order if name.startswith("up_blocks.")]
    assert decoder(unet) == whole
    assert len(set(names)) == len(names) < len(whole)
    assert set(names) <= set(whole)
    positions = [order.index(name) for name in names]
    assert positions == sorted(positions)
    assert not any(".attentions." in name for name in names)


@pytest.mark.parametrize(("name", "resnets"), [("two layers", {2, 3}), ("condition, cross attention", {2, 3})])
def test_decoder_middle_follows_the_rule(name, resnets):
    # Two up blocks of three resnets: N = 6, so N//3 = 2 up to 3N//4 - 1 = 3.
    unet = build(name)
    chosen = {(int(block), int(resnet)) for block, resnet in (divmod(index, 3) for index in resnets)}
    names = decoder_middle(unet)
    assert {(int(n.split(".")[1]), int(n.split(".")[3])) for n in names if ".resnets." in n} == chosen
    # Only the upsampler after resnet 2, the last of its block.
    assert [n for n in names if ".upsamplers." in n] == ["up_blocks.0.upsamplers.0.conv"]


@pytest.mark.parametrize("name", ["attention", "condition, cross attention"])
def test_names_of_an_adapted_unet_are_those_without_adapters(name):
    def unet():
        # PEFT's LoRA initialises values, so this one is not on the meta device.
        cls, config = UNETS[name]
        return cls(**config)

    expected = unet_conv_names(unet()), decoder_middle(unet())
    adapted = {
        "funlora": get_peft_model(unet(), FunLoraConfig(target_modules="all-conv")),
        "lora": get_peft_model(unet(), LoraConfig(target_modules=["conv1", "conv_shortcut", "to_q"])),
        "mixed": PeftMixedModel(unet(), LoraConfig(target_modules=["conv1"]), "default"),
        "injected": inject_adapter_in_model(FunLoraConfig(target_modules=["conv1"]), unet()),
        "modules_to_save": get_peft_model(
            unet(), FunLoraConfig(target_modules=["conv1"], modules_to_save=["conv_in", "mid_block"])
        ),
    }
    for method, model in adapted.items():
        assert (unet_conv_names(model), decoder_middle(model)) == expected, method
        assert knows_order(model), method


def test_a_name_of_ones_own_that_looks_like_a_wrapper_is_kept():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Conv2d(1, 1, 1)
            self.original_module = nn.Conv2d(1, 1, 1)

    assert conv_names(nn.ModuleDict({"a": Block()})) == ["a.base_layer", "a.original_module"]


def test_plain_modules_are_named_modules_without_adapters():
    unet = build("attention")
    assert list(plain_modules(unet)) == list(unet.named_modules())


def test_without_peft():
    unet = build("plain")
    model = get_peft_model(unet, FunLoraConfig())
    assert without_peft(model) is without_peft(model.base_model) is without_peft(unet) is unet


def test_shared_convolutions_are_named_once():
    shared = nn.Conv2d(1, 1, 1)
    assert conv_names(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Conv2d(1, 1, 1)})) == ["a", "c"]


def test_all_conv_adapts_every_convolution():
    unet = build("condition, cross attention")
    expected = set(conv_names(unet))
    with torch.device("meta"):
        model = get_peft_model(unet, FunLoraConfig(target_modules="all-conv"))
    assert {name for name, _ in plain_modules(model) if name in expected} == expected
    assert set(model.targeted_module_names) == expected


@pytest.mark.parametrize("name", ["attention", "condition, cross attention"])
def test_no_targets_are_the_middle_of_the_decoder(name):
    unet = build(name)
    expected = set(decoder_middle(unet))
    with torch.device("meta"):
        model = get_peft_model(unet, FunLoraConfig())
    assert set(model.targeted_module_names) == expected


def test_no_targets_need_a_unet_of_known_order():
    unet = build("plain")
    unet.control = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"Please specify `target_modules` .* the model is a UNet2DModel\."):
        get_peft_model(unet, FunLoraConfig())


@pytest.mark.parametrize("name", ["SD", "SD3", "Flux"])
def test_projections_that_attention_does_not_call_are_no_targets(name):
    """Whatever diffusers makes of `fuse_qkv_projections`: SD3 goes on calling the parts, and a U-Net keeps what it has fused."""
    pipe = make_pipeline(name)
    model = component(pipe)
    for change in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        getattr(model, change)()
        called = set()
        layers = [key for key, _ in model.named_modules() if key.rpartition(".")[2] in PROJECTIONS]
        handles = [
            model.get_submodule(key).register_forward_hook(lambda *_, key=key, called=called: called.add(key))
            for key in layers
        ]
        sample(pipe)
        for handle in handles:
            handle.remove()
        for key in layers:
            config = FunLoraConfig(target_modules=[key])
            with nullcontext() if key in called else pytest.raises(ValueError, match=f"{key} is not called"):
                inject_adapter_in_model(config, model)
            remove_adapters(model, ["default"])
