"""FunLoraModel: what it puts where, how the model starts, what PEFT says of it, and what it refuses."""

import re

import pytest
import torch
from peft import (
    LoraConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peft_models import (
    CONDITION_UNET,
    PLAIN,
    UNET,
    adapter_parameters,
    close,
    differ,
    funlora_layers,
    kinds,
    make_unet,
)
from torch import nn

from funlora_hf import FunLoraConfig, FunLoraModel
from funlora_hf.tuner import FunLoraClassVector, FunLoraConv2d, FunLoraLayer, FunLoraLinear
from funlora_hf.tuner.functional import FUNCTIONS, OPERATIONS


# The start


@kinds
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_starts_as_the_base_but_for_the_class(kind, function, operation):
    base = kind.base()
    expected = kind.run(base)
    config = {"function": function, "operation": operation}
    close(kind.run(kind.model(base=base, init_weights=True, class_embedding=None, **config)), expected)
    assert differ(kind.run(kind.model(class_embedding=None, **config)), expected)


@kinds
def test_only_the_adapter_is_trainable(kind):
    model = kind.model()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model))
    assert trainable


@kinds
def test_class_label_does_not_matter_to_an_adapter(kind):
    inputs = kind.batch()
    other = {**inputs, "class_labels": torch.tensor([1000, 5, 2])}  # the base knows two classes
    model = kind.model()
    assert torch.equal(kind.run(model, inputs), kind.run(model, other))
    without = kind.model(class_embedding=None)
    assert differ(kind.run(without, inputs), kind.run(without, {**inputs, "class_labels": 1 - inputs["class_labels"]}))


@kinds
def test_inject_adapter_in_model(kind):
    base = kind.base()
    torch.manual_seed(1)
    assert inject_adapter_in_model(kind.config(), base) is base
    model = kind.model()
    assert len(funlora_layers(base)) == len(funlora_layers(model)) > 1
    assert torch.equal(kind.run(base), kind.run(model))


def test_the_module_is_a_funlora_model():
    model = UNET.model()
    assert isinstance(model.base_model, FunLoraModel)
    assert repr(funlora_layers(model)[0]).startswith("funlora.")


# What PEFT says of it


@kinds
def test_status(kind):
    model = kind.model("x", "y")
    layers = funlora_layers(model)
    numbers = {name: sum(p.numel() for p in adapter_parameters(model, name).values()) for name in "xy"}
    base = sum(p.numel() for p in kind.base().parameters())
    status = get_model_status(model)
    assert status.base_model_type == type(kind.base()).__name__
    assert status.adapter_model_type == "FunLoraModel"
    assert status.peft_types == {"x": "FUNLORA", "y": "FUNLORA"}
    assert status.num_adapter_layers == len(layers)
    assert status.trainable_params == numbers["x"]
    assert status.total_params == base + numbers["x"] + numbers["y"]
    assert status.requires_grad == {"x": True, "y": False}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["x"], [])
    assert status.devices == {"x": ["cpu"], "y": ["cpu"]}

    by_layer = get_layer_status(model)
    assert [s.name for s in by_layer] == [n for n, m in model.base_model.named_modules() if m in layers]
    assert [s.module_type for s in by_layer] == [f"funlora.{type(layer).__name__}" for layer in layers]
    assert all(s.available_adapters == ["x", "y"] for s in by_layer)

    model.merge_adapter(["y"])
    model.disable_adapter_layers()
    status = get_model_status(model)
    assert (status.enabled, status.merged_adapters) == (False, ["y"])


@kinds
def test_print_trainable_parameters(kind, capsys):
    model = kind.model("x", "y", modules_to_save=[kind.whole])
    model.print_trainable_parameters()
    trainable, total = (
        int(number.replace(",", "")) for number in re.findall(r"params: ([\d,]+)", capsys.readouterr().out)
    )
    # A convolution or linear layer: one A entry a row, one B entry a column, ten alpha, ten omega.
    weights = [layer.weight.shape for layer in funlora_layers(model) if not isinstance(layer, FunLoraClassVector)]
    vector = kind.base().class_embedding.embedding_dim
    adapter = sum(rows + columns + 20 for rows, columns, *_ in weights) + vector
    whole = sum(p.numel() for p in kind.base().get_submodule(kind.whole).parameters())
    assert trainable == adapter + whole
    assert total == sum(p.numel() for p in kind.base().parameters()) + 2 * (adapter + whole)


# Targets


def adapted_names(model):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, FunLoraLayer) and not isinstance(module, FunLoraClassVector)
    }


def weights_of(base):
    return {name for name, module in base.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def convolutions(base):
    return {name for name, module in base.named_modules() if isinstance(module, nn.Conv2d)}


TARGETS = [
    (UNET, {"target_modules": "all-conv"}, lambda name, conv: conv),
    (CONDITION_UNET, {"target_modules": "all-conv"}, lambda name, conv: conv),
    (PLAIN, {"target_modules": "all-conv"}, lambda name, conv: conv),
    (
        UNET,
        {"target_modules": r"up_blocks\.\d+\.resnets\.0\.conv[12]"},
        lambda name, conv: re.fullmatch(r"up_blocks\.\d\.resnets\.0\.conv.", name),
    ),
    (CONDITION_UNET, {"target_modules": r".*attn[12]\.to_[qv]"}, lambda name, conv: name.endswith(("to_q", "to_v"))),
    (PLAIN, {"target_modules": r"(blocks|mlp)\.0"}, lambda name, conv: name in ("blocks.0", "mlp.0")),
    (UNET, {"target_modules": ["conv1", "conv_in"]}, lambda name, conv: name.endswith(("conv1", "conv_in"))),
    (
        CONDITION_UNET,
        {"target_modules": ["to_k", "conv1"]},
        lambda name, conv: name.endswith(("to_k", "conv1")),
    ),
    (PLAIN, {"target_modules": ["0"]}, lambda name, conv: name.endswith(".0")),
    (
        UNET,
        {"target_modules": "all-conv", "exclude_modules": ["conv1", "conv_out"]},
        lambda name, conv: conv and not name.endswith(("conv1", "conv_out")),
    ),
    (
        CONDITION_UNET,
        {"target_modules": "all-conv", "exclude_modules": r"(up|down|mid)_.*"},
        lambda name, conv: name in ("conv_in", "conv_out"),
    ),
    (PLAIN, {"target_modules": ["0", "head"], "exclude_modules": ["mlp.0"]}, lambda n, c: n in ("blocks.0", "head")),
    (
        UNET,
        {"target_modules": ["conv1", "conv2"], "layers_to_transform": [1], "layers_pattern": "resnets"},
        lambda name, conv: re.search(r"resnets\.1\.conv\d", name),
    ),
    (
        CONDITION_UNET,
        {"target_modules": ["to_q"], "layers_to_transform": 1, "layers_pattern": ["attentions", "nothing"]},
        lambda name, conv: "attentions.1." in name and name.endswith("to_q"),
    ),
]


@pytest.mark.parametrize(("kind", "config", "chosen"), TARGETS)
@pytest.mark.parametrize("class_embedding", [None, "class_embedding"])
def test_target_modules(kind, config, chosen, class_embedding):
    base = kind.base()
    model = kind.model(class_embedding=class_embedding, **config)
    expected = {name for name in weights_of(base) if chosen(name, name in convolutions(base))}
    assert expected
    assert adapted_names(model) == expected
    assert isinstance(model.base_model.model.class_embedding, FunLoraClassVector) is (class_embedding is not None)


def test_layer_indexes_that_no_layer_has():
    with pytest.raises(ValueError, match=r"layers_to_transform.*7.*layers_pattern.*resnets"):
        UNET.model(class_embedding=None, target_modules=["conv1"], layers_to_transform=[7], layers_pattern="resnets")


def test_default_target_is_the_middle_of_the_decoder():
    model = UNET.model()
    names = adapted_names(model)
    assert names == set(model.peft_config["default"].target_modules)
    assert {name.split(".")[0] for name in names} == {"up_blocks"}


def test_target_modules_must_be_given_for_models_other_than_unets():
    with pytest.raises(ValueError, match=rf"target_modules.*{type(PLAIN.base()).__name__}"):
        PLAIN.model(target_modules=None)


def test_attention_of_an_unconditional_unet_is_adapted_too():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = UNET.model(
        "x", "y", base=make_unet(**blocks), target_modules=["to_q", "to_out.0", "time_embedding.linear_1"]
    )
    layers = [type(layer) for layer in funlora_layers(model)]
    assert layers.count(FunLoraLinear) == 9  # four attentions of two layers each, and the time embedding
    assert layers.count(FunLoraConv2d) == 0
    together = UNET.run(model, adapter_names=["x", "y", "x"])
    model.set_adapter("y")
    close(together[1], UNET.run(model)[1])


def test_all_conv_leaves_copies_of_other_adapters_alone():
    model = UNET.model("x", modules_to_save=["conv_out"], class_embedding=None)
    model.add_adapter("y", FunLoraConfig(target_modules="all-conv", modules_to_save=["conv_out"]))
    targets = model.peft_config["y"].target_modules
    assert not {"x", "original_module"} & {name.split(".")[-1] for name in targets}
    assert adapted_names(model) == convolutions(make_unet()) - {"conv_out"}


# What it refuses


@pytest.mark.parametrize("target", ["conv_norm_out", "time_proj"])
def test_unsupported_module(target):
    with pytest.raises(ValueError, match="not supported") as error:
        UNET.model(target_modules=[target])
    assert "torch.nn.Conv2d" in str(error.value)


@pytest.mark.parametrize(
    "module", [nn.ConvTranspose2d(3, 3, 3), nn.Conv1d(3, 3, 3), nn.Conv3d(3, 3, 3), nn.Bilinear(3, 3, 3)]
)
def test_other_modules_with_a_weight_are_unsupported(module):
    with pytest.raises(ValueError, match=rf"(?s){type(module).__name__}.*not supported"):
        get_peft_model(nn.Sequential(module), FunLoraConfig(target_modules=["0"]))


@kinds
@pytest.mark.parametrize("class_embedding", [None, "class_embedding"])
@pytest.mark.parametrize("target_modules", [["no_such_module"], r"no_such_\w+"])
def test_unknown_target(kind, class_embedding, target_modules):
    with pytest.raises(ValueError, match=r"Target modules .*no_such_.* not found"):
        kind.model(target_modules=target_modules, class_embedding=class_embedding)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize(
    ("kind", "lora_target", "config"),
    [
        (UNET, "up_blocks.0.resnets.1.conv1", {"target_modules": ["conv1"]}),
        (CONDITION_UNET, "attentions.0.transformer_blocks.0.attn1.to_q", {"target_modules": ["to_q"]}),
        (PLAIN, "mlp.0", {"target_modules": ["mlp.0"]}),
        (UNET, "class_embedding", {}),
    ],
)
def test_a_layer_with_another_methods_adapter_is_refused(kind, lora_target, config):
    base = kind.base()
    get_peft_model(base, LoraConfig(target_modules=[lora_target]))
    with pytest.raises(ValueError, match=rf"{lora_target}.*another method"):
        kind.model(base=base, **config)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_another_method_works_beside_funlora():
    model = CONDITION_UNET.model("x", target_modules=["conv1"])
    expected = CONDITION_UNET.run(model)
    both = get_peft_model(model.base_model.model, LoraConfig(target_modules=["to_q"]), adapter_name="other").eval()
    assert torch.equal(CONDITION_UNET.run(both), expected)  # LoRA starts at zero
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    together = CONDITION_UNET.run(both)
    assert differ(together, expected)
    both.merge_adapter()
    close(CONDITION_UNET.run(both), together, 1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("class_embedding", {"num_class_embeds": None}, ["class_embedding", "UNet2DModel", "num_class_embeds"]),
        ("label_emb", {}, ["label_emb", "UNet2DModel"]),
        ("conv_in", {}, ["conv_in", "Conv2d", "Embedding"]),
        ("class_embedding", {"class_embed_type": "timestep"}, ["class_embedding", "TimestepEmbedding", "Embedding"]),
    ],
)
def test_class_embedding_errors(name, changes, words):
    with pytest.raises(ValueError, match="`class_embedding`") as error:
        UNET.model(base=make_unet(**changes), class_embedding=name)
    for word in words:
        assert word in str(error.value)
