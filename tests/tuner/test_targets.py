"""The layers taken by default, and the paper's parameter counts, to the last digit."""

from functools import partial

import pytest
import torch
from diffusers import UNet2DModel
from peft import get_peft_model
from torch import nn

from funlora_hf import FunLoraConfig
from funlora_hf.tuner.targets import conv_names, decoder_middle, unet_conv_names


CIFAR = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "dropout": 0.1,
    "num_class_embeds": 10,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
IMAGENET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 384, 512),
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "num_class_embeds": 20,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
SMALL_VARIANTS = {
    "plain": {},
    "attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "two layers": {"layers_per_block": 2},
    "one block": {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
    "resampling by resnets": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resampling blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "no middle block": {"mid_block_type": None},
    "three blocks": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
    "skip blocks": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
}


def build(config):
    """On the meta device: shapes without memory, and forward passes without arithmetic."""
    with torch.device("meta"):
        return UNet2DModel(**config)


def executed(unet):
    """Names of the Conv2d in the order in which a forward runs them."""
    names = []
    handles = [
        module.register_forward_pre_hook(partial(lambda name, *_: names.append(name), name))
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    size = unet.config.sample_size
    labels = torch.zeros(1, dtype=torch.long, device="meta") if unet.config.num_class_embeds else None
    with torch.no_grad():
        unet(torch.zeros(1, 3, size, size, device="meta"), torch.zeros(1, device="meta"), class_labels=labels)
    for handle in handles:
        handle.remove()
    return names


def trainable(unet, **config):
    model = get_peft_model(unet, FunLoraConfig(**config))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.fixture(scope="module")
def cifar():
    return build(CIFAR)


def test_the_papers_cifar_backbone(cifar):
    # arXiv 2510.02631: 35.75M parameters with 10 classes
    assert sum(parameter.numel() for parameter in cifar.parameters()) == 35_751_427
    assert len(unet_conv_names(cifar)) == len(conv_names(cifar)) == 65


@pytest.mark.parametrize("config", [CIFAR, IMAGENET], ids=["cifar", "imagenet"])
def test_names_are_in_order_of_execution_on_the_papers_backbones(config):
    unet = build(config)
    assert unet_conv_names(unet) == executed(unet)


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_names_are_in_order_of_execution(variant):
    unet = build({**SMALL, **SMALL_VARIANTS[variant]})
    assert unet_conv_names(unet) == executed(unet)


def test_decoder_middle_of_cifar_is_40_to_54(cifar):
    assert decoder_middle(cifar) == executed(cifar)[40:55]


def test_decoder_middle_of_imagenet_is_40_to_56():
    unet = build(IMAGENET)
    names = executed(unet)
    assert len(names) == 67
    assert decoder_middle(unet) == names[40:57]


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_decoder_middle_of_other_unets(variant):
    unet = build({**SMALL, **SMALL_VARIANTS[variant]})
    names, order = decoder_middle(unet), executed(unet)
    assert names
    assert all(name.startswith("up_blocks.") for name in names)
    decoder = [name for name in order if name.startswith("up_blocks.")]
    assert len(set(names)) == len(names) < len(decoder)
    positions = [order.index(name) for name in names]
    assert positions == sorted(positions)


def test_decoder_middle_of_an_adapted_unet_is_the_same():
    unet = build({**SMALL, "num_class_embeds": 2})
    expected = decoder_middle(unet)
    model = get_peft_model(unet, FunLoraConfig(target_modules="all-conv"))
    assert decoder_middle(model.base_model.model) == expected
    assert set(conv_names(model.base_model.model)) == set(executed(build({**SMALL, "num_class_embeds": 2})))


# The paper's parameters per class


@pytest.mark.parametrize(
    ("first", "last", "count"),
    [  # arXiv 2510.02631, Table I
        (0, 64, 34054),
        (5, 54, 29440),
        (15, 44, 18432),
        (15, 54, 24832),
        (25, 44, 13312),
        (25, 54, 19712),
        (35, 54, 13056),
        (40, 54, 9728),
        (45, 54, 6400),
        (40, 49, 6656),
        (45, 49, 3328),
    ],
)
def test_parameters_by_range_of_convolutions(first, last, count):
    unet = build(CIFAR)
    assert trainable(unet, function="identity", target_modules=unet_conv_names(unet)[first : last + 1]) == count


@pytest.mark.parametrize(
    ("config", "middle", "all_conv"),
    [  # arXiv 2510.02631, Tables I (identity) and II, p = 10
        ({"function": "cosine"}, 10028, 35354),
        ({"function": "power"}, 10028, 35354),
        ({"function": "shift"}, 9878, 34704),
        ({"function": "cosine", "train_omega": False}, 9878, 34704),
        ({"function": "power", "train_omega": False}, 9878, 34704),
        ({"function": "identity"}, 9728, 34054),
    ],
)
def test_parameters_by_function(config, middle, all_conv):
    assert trainable(build(CIFAR), **config) == middle
    assert trainable(build(CIFAR), target_modules="all-conv", **config) == all_conv


@pytest.mark.parametrize(
    ("ratio", "count"),
    # arXiv 2510.02631, Table IV; ratio 2 is printed as 5.284K there, a misprint
    [(1, 10028), (2, 5164), (4, 2732), (8, 1516), (16, 908)],
)
def test_parameters_by_ratio(ratio, count):
    assert trainable(build(CIFAR), ratio=ratio) == count


def test_parameters_on_imagenet():
    assert trainable(build(IMAGENET)) == 13652  # arXiv 2510.02631, Table V


def test_the_class_vector_adds_512():
    assert trainable(build(CIFAR), class_embedding="class_embedding") == 10028 + 512


def test_parameters_by_operation_and_rank():
    assert trainable(build(CIFAR), operation="add") == 10028
    assert trainable(build(CIFAR), operation="mul-add") == 2 * 10028
    assert trainable(build(CIFAR), function="identity", r=3) == 3 * 9728


def test_adapters_can_be_counted_wholly_on_the_meta_device():
    with torch.device("meta"):
        assert trainable(UNet2DModel(**CIFAR)) == 10028
