"""Order of layers, presets, budgets, counts and importance."""

from __future__ import annotations

import ast
import copy
import math

import numpy as np
import pytest
import torch
from backbones import CIFAR, build, executed, inputs
from diffusers import UNet2DModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from text_to_image import make_model
from torch import nn

from funlora_hf import FunLoraConfig, FunLoraModel, conv_layers, layer_importance, parameters_per_class, select_layers
from funlora_hf.layer_selection import LayerImportance


class Other(nn.Module):
    """Runs its convolutions in another order than it registers them; `twice` twice, `never` never."""

    def __init__(self):
        super().__init__()
        self.never = nn.Conv2d(2, 2, 1)
        self.last = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.twice = nn.Conv2d(2, 2, 1)
        self.linear = nn.Linear(2, 2)
        self.middle = nn.Sequential(nn.Conv2d(2, 2, 1))

    def forward(self, x, shift=0):
        return self.last(self.twice(self.norm(self.middle(self.twice(x))))) + shift


X = torch.ones(1, 2, 3, 3)
MODELS = [
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
]
IN_ORDER = ["twice", "middle.0", "last"]


# conv_layers


@pytest.mark.parametrize("name", ["attention", "condition, cross attention"])
def test_unets_need_no_inputs_and_are_traced_with_them(name):
    unet = build(name)
    assert conv_layers(unet) == conv_layers(unet, inputs(unet)) == executed(unet)


def test_unets_of_unknown_order_need_inputs():
    unet = build("condition, cross attention", dual_cross_attention=True)
    with pytest.raises(ValueError, match=r"`example_inputs` is None, .* the model is a UNet2DConditionModel\. Pass"):
        conv_layers(unet)
    own = build("plain")
    own.control = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="`example_inputs` is None"):
        conv_layers(own)
    # This one never runs.
    assert conv_layers(own, inputs(own)) == conv_layers(build("plain"))


@pytest.mark.parametrize("example", [(X,), [X], X, {"x": X}, (X, 1), {"x": X, "shift": 2}])
def test_other_models_are_traced(example):
    assert conv_layers(Other(), example) == IN_ORDER


def test_tracing_leaves_the_model_as_it_was():
    model = Other().train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    conv_layers(model, X)
    assert [module.training for module in (model, model.last, model.norm, model.middle[0])] == [
        True,
        True,
        False,
        True,
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failing_forward_leaves_no_hooks():
    model = Other().train()
    with pytest.raises(RuntimeError):
        conv_layers(model, torch.ones(1, 5, 3, 3))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


@pytest.mark.parametrize("method", ["funlora", "lora", "injected", "modules_to_save", "disabled"])
def test_adapted_models_are_traced_by_the_names_without_adapters(method):
    model = {
        "funlora": lambda: get_peft_model(Other(), FunLoraConfig(target_modules="all-conv")),
        "lora": lambda: get_peft_model(Other(), LoraConfig(target_modules=["twice", "last"])),
        "injected": lambda: inject_adapter_in_model(FunLoraConfig(target_modules=["twice"]), Other()),
        "modules_to_save": lambda: get_peft_model(
            Other(), LoraConfig(target_modules=["last"], modules_to_save=["twice"])
        ),
        "disabled": lambda: get_peft_model(Other(), FunLoraConfig(target_modules="all-conv")),
    }[method]()
    if method == "disabled":
        model.base_model.disable_adapter_layers()
    assert conv_layers(model, X) == IN_ORDER


def test_a_block_in_modules_to_save_is_traced():
    model = get_peft_model(Other(), LoraConfig(target_modules=["last"], modules_to_save=["middle"]))
    assert conv_layers(model, X) == IN_ORDER


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, r"`example_inputs` is None, .* the model is a Other\. Pass the arguments of one forward"),
        (3, "`example_inputs` is a int, expected a tuple"),
    ],
)
def test_wrong_inputs_are_named(example, message):
    with pytest.raises(ValueError, match=message):
        conv_layers(Other(), example)


# select_layers


def test_presets_on_a_unet():
    unet = build("two layers")
    order = conv_layers(unet)
    assert select_layers(unet, "all") == order
    assert select_layers(unet, "decoder") == [name for name in order if name.startswith("up_blocks.")]
    assert select_layers(unet) == select_layers(unet, "decoder-middle")
    assert select_layers(unet, "0-0") == ["conv_in"]
    assert select_layers(unet, f"3-{len(order) - 1}") == order[3:]


def test_presets_on_other_models():
    assert select_layers(Other(), "all", example_inputs=X) == IN_ORDER
    assert select_layers(Other(), "1-2", example_inputs=X) == IN_ORDER[1:]


def test_presets_are_target_modules():
    unet = build("attention")
    names = select_layers(unet, "decoder")
    with torch.device("meta"):
        model = get_peft_model(unet, FunLoraConfig(target_modules=names))
    assert set(model.targeted_module_names) == set(names)
    # and selecting again, on the adapted model, gives the same
    assert select_layers(model, "decoder") == names


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (
            "middle",
            r"`preset` is 'middle', expected one of: all, decoder, decoder-middle, attention, cross-attention, a range like '40-54', a budget",
        ),
        ("5", "expected one of"),
        ("5-4", r"`preset` is '5-4', expected two rising indices between 0 and \d+: the model has \d+ conv"),
        ("0-999", "expected two rising indices"),
        ("<= 5K per class", r"`importance` is None, but the budget '<= 5K per class' is filled by importance"),
        ("< 5K", "expected one of"),
    ],
)
def test_wrong_presets_are_named(preset, message):
    with pytest.raises(ValueError, match=message):
        select_layers(build("plain"), preset)


@pytest.mark.parametrize("preset", ["decoder", "decoder-middle"])
def test_a_model_without_decoder_is_named(preset):
    with pytest.raises(ValueError, match=f"`preset` is '{preset}', a part of a UNet2DModel .* the model is a Other"):
        select_layers(Other(), preset, example_inputs=X)


def test_a_model_without_convolutions_is_named():
    with pytest.raises(ValueError, match="but Sequential has no Conv2d that runs"):
        select_layers(nn.Sequential(nn.Linear(2, 2)), "all", example_inputs=torch.ones(1, 2))


@pytest.mark.parametrize("name", MODELS)
def test_attention_presets(name):
    """Against all Linear layers in modules that diffusers calls attn, attn1 or attn2."""
    model = make_model(name)
    chosen = select_layers(model, "attention")
    config = FunLoraConfig(target_modules=chosen)
    assert parameters_per_class(model, config).without_vector > 0
    in_attention = [key for key, module in model.named_modules() if isinstance(module, nn.Linear) and ".attn" in key]
    assert chosen == in_attention
    prompts = [key for key in in_attention if ".attn2." in key]
    if name in ("UNet2DConditionModel", "PixArtTransformer2DModel"):
        assert prompts
        assert select_layers(model, "cross-attention") == prompts
    else:
        with pytest.raises(ValueError, match=f"`preset` is 'cross-attention', but {name} has no such attention"):
            select_layers(model, "cross-attention")


def test_the_attention_preset_takes_what_is_called():
    model = make_model("FluxTransformer2DModel")
    expected = select_layers(model, "attention")
    model.fuse_qkv_projections()
    fused = select_layers(model, "attention")
    adapted = get_peft_model(model, FunLoraConfig(target_modules=fused))
    assert {name.rpartition(".")[2] for name in fused} == {"to_qkv", "to_added_qkv", "0", "to_add_out"}
    assert select_layers(adapted, "attention") == fused
    model = make_model("FluxTransformer2DModel")
    assert select_layers(get_peft_model(model, FunLoraConfig(target_modules=expected)), "attention") == expected


@pytest.mark.parametrize("name", MODELS[1:])
def test_no_targets_on_a_transformer_names_sensible_ones(name):
    model = make_model(name)
    with pytest.raises(
        ValueError, match=rf"the model is a {name}\. Try the projections of its attention: \["
    ) as raised:
        get_peft_model(model, FunLoraConfig())
    targets = ast.literal_eval(str(raised.value).rpartition("attention: ")[2].rstrip("."))
    adapted = get_peft_model(model, FunLoraConfig(target_modules=targets))
    assert adapted.targeted_module_names == select_layers(model, "attention")


class Sizes(nn.Module):
    """Costs with `identity`: a 2 + 8 = 10, b 8 + 4 = 12, c 4 + 2 = 6, d 2 + 2 = 4 numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, o, 1) for i, o in ((2, 8), (8, 4), (4, 2), (2, 2)))

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))


IMPORTANCE = {"a": 1.0, "b": 4.0, "c": 3.0, "d": 2.0}
IDENTITY = FunLoraConfig(function="identity")


@pytest.mark.parametrize(
    ("budget", "layers"),
    [
        (4, ["d"]),
        (6, ["c"]),
        (10, ["c", "d"]),
        (12, ["b"]),
        (17, ["b", "d"]),  # c does not fit beside b any more, d does
        (18, ["b", "c"]),
        (22, ["b", "c", "d"]),
        (31, ["b", "c", "d"]),
        (32, ["a", "b", "c", "d"]),
    ],
)
def test_a_budget_is_filled_by_importance(budget, layers):
    chosen = select_layers(Sizes(), f"<={budget}", example_inputs=X, importance=IMPORTANCE, config=IDENTITY)
    assert chosen == layers
    config = FunLoraConfig(function="identity", target_modules=chosen)
    assert parameters_per_class(Sizes(), config).without_vector <= budget


@pytest.mark.parametrize(
    "preset", ["<= 5K per class", "<=5000 per class", "<= 5k", "<=5.0K per class", "<= 5000", "<=5K"]
)
def test_ways_to_write_a_budget(preset):
    unet = build("paper's cifar")
    importance = dict.fromkeys(conv_layers(unet), LayerImportance(0.5, 0.1))
    chosen = select_layers(unet, preset, importance=importance)
    count = parameters_per_class(unet, FunLoraConfig(target_modules=chosen)).without_vector
    # Of equal importance: from the first layer on, until nothing that is left fits.
    assert chosen[:3] == conv_layers(unet)[:3]
    assert 4900 < count <= 5000


def test_a_budget_counts_with_the_configuration():
    def chosen(**config):
        return select_layers(Sizes(), "<= 20", example_inputs=X, importance=IMPORTANCE, config=FunLoraConfig(**config))

    assert chosen(function="identity") == ["b", "c"]
    assert chosen(function="identity", ratio=2) == ["a", "b", "c", "d"]
    # Neither the class vector nor the targets of the configuration count.
    assert chosen(function="identity", target_modules=["a"]) == ["b", "c"]
    lora = select_layers(Sizes(), "<= 20", example_inputs=X, importance=IMPORTANCE, config=LoraConfig(r=1))
    assert lora == ["b", "c"]


def test_a_budget_takes_linear_layers_by_importance():
    model = make_model("SD3Transformer2DModel")
    adapter = get_peft_model(make_model("SD3Transformer2DModel"), FunLoraConfig(target_modules=["to_q", "to_out.0"]))
    with torch.no_grad():
        adapter.base_model.model.transformer_blocks[0].attn.to_out[0].funlora_A["default"].add_(1)
    importance = layer_importance(adapter)
    cost = parameters_per_class(model, FunLoraConfig(target_modules=["to_out.0"])).without_vector
    chosen = select_layers(model, f"<= {cost}", importance=importance)
    assert chosen == ["transformer_blocks.0.attn.to_out.0"]
    # Beside convolutions, whose order must be known.
    both = {"transformer_blocks.0.attn.to_q": 1.0, "pos_embed.proj": 2.0}
    with pytest.raises(ValueError, match="`example_inputs` is None"):
        select_layers(model, "<= 1K", importance=both)
    importance = {"linear": 1.0, "last": 2.0}
    assert select_layers(Other(), "<= 1K", example_inputs=X, importance=importance) == ["last", "linear"]


def test_layers_without_importance_are_not_taken():
    assert select_layers(
        Sizes(), "<= 100", example_inputs=X, importance={"c": (1.0, 0.2), "a": (0.1, 0.0)}, config=IDENTITY
    ) == ["a", "c"]


@pytest.mark.parametrize(
    ("importance", "preset", "message"),
    [
        ({}, "<= 5", "`importance` is {}, but the budget"),
        ({"a": 1.0, "c": math.nan}, "<= 50", "`importance` of 'c' is nan, expected a finite number"),
        ({"a": 1.0, "z": 2.0}, "<= 50", "`importance` has z, which the model does not run as a Conv2d"),
        (IMPORTANCE, "<= 3", "the cheapest layer costs 4 parameters per class: raise the budget"),
    ],
)
def test_budgets_that_cannot_be_filled_are_named(importance, preset, message):
    with pytest.raises(ValueError, match=message):
        select_layers(Sizes(), preset, example_inputs=X, importance=importance, config=IDENTITY)


# parameters_per_class


@pytest.fixture(scope="module")
def cifar():
    return build("paper's cifar")


def test_counts_are_those_of_a_trained_adapter(tiny_unet):
    for config in (
        FunLoraConfig(class_embedding="class_embedding"),
        FunLoraConfig(operation="mul-add", r=2, ratio=2, target_modules="all-conv"),
        FunLoraConfig(target_modules=["conv1"], modules_to_save=["conv_out"]),
        FunLoraConfig(target_modules=set(), class_embedding="class_embedding"),
        LoraConfig(target_modules=["conv1"], r=3, bias="all"),
        LoraConfig(target_modules=["conv1"], trainable_token_indices={"class_embedding": [0]}),
    ):
        found = parameters_per_class(tiny_unet, config)
        model = get_peft_model(copy.deepcopy(tiny_unet), copy.deepcopy(config))
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        assert found.with_vector == sum(trained.values())
        vectors = sum(n for name, n in trained.items() if "class_embedding" in name)
        assert found.with_vector - found.without_vector == vectors
        has_vector = getattr(config, "class_embedding", None) or getattr(config, "trainable_token_indices", None)
        assert vectors == (tiny_unet.class_embedding.embedding_dim if has_vector else 0)


def test_counts_by_operation_and_rank(cifar):
    def count(**config):
        return parameters_per_class(cifar, FunLoraConfig(**config))

    assert count() == (10028, 10028)
    assert count(class_embedding="class_embedding") == (10028, 10540)
    assert count(class_embedding="class_embedding", target_modules=[]) == (0, 512)
    assert count(operation="add") == (10028, 10028)
    assert count(operation="mul-add") == (2 * 10028, 2 * 10028)
    assert count(function="identity", r=3) == (3 * 9728, 3 * 9728)


def test_counts_of_lora_on_attention(cifar):
    # arXiv 2510.02631, Table V: 18.432K with q, k and v as one layer; diffusers has three
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    assert parameters_per_class(cifar, config) == (24576, 24576)


def test_counting_changes_nothing(tiny_unet):
    before = {name: (id(tensor), tensor.clone()) for name, tensor in tiny_unet.state_dict(keep_vars=True).items()}
    modules = [(name, type(module)) for name, module in tiny_unet.named_modules()]
    tiny_unet.train()
    for config in (FunLoraConfig(inference_mode=True), LoraConfig(target_modules=["conv1"])):
        original = copy.deepcopy(config)
        assert parameters_per_class(tiny_unet, config).with_vector > 0
        assert config == original
    after = tiny_unet.state_dict(keep_vars=True)
    assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())
    assert [(name, type(module)) for name, module in tiny_unet.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in tiny_unet.parameters())
    assert tiny_unet.training


def test_counting_copies_no_weight(monkeypatch, tiny_unet):
    def refuse(*args, **kwargs):
        raise AssertionError("a weight is copied")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
    assert parameters_per_class(tiny_unet, FunLoraConfig()).with_vector > 0


@pytest.mark.parametrize("method", ["funlora", "lora", "injected", "modules_to_save"])
def test_adapters_that_are_there_do_not_count(tiny_unet, method):
    config = FunLoraConfig(class_embedding="class_embedding")
    expected = parameters_per_class(tiny_unet, config)
    model = {
        "funlora": lambda: get_peft_model(tiny_unet, FunLoraConfig(target_modules="all-conv")),
        "lora": lambda: get_peft_model(tiny_unet, LoraConfig(target_modules=["conv1", "conv2"])),
        "injected": lambda: inject_adapter_in_model(copy.deepcopy(config), tiny_unet),
        "modules_to_save": lambda: get_peft_model(
            tiny_unet, LoraConfig(target_modules=["conv1"], modules_to_save=["class_embedding", "conv_out"])
        ),
    }[method]()
    layers = [type(module) for module in model.modules()]
    assert parameters_per_class(model, config) == expected
    assert [type(module) for module in model.modules()] == layers


def test_targets_that_the_model_does_not_have_are_pefts_error(cifar):
    with pytest.raises(ValueError, match="not found in the base model"):
        parameters_per_class(cifar, FunLoraConfig(target_modules=["nowhere"]))


def test_a_model_on_the_meta_device_is_counted():
    with torch.device("meta"):
        assert parameters_per_class(UNet2DModel(**CIFAR), FunLoraConfig()).with_vector == 10028


# layer_importance


def state(A, B, layer="up.conv"):
    return {
        f"base_model.model.{layer}.funlora_A": torch.tensor(A)[:, None],
        f"base_model.model.{layer}.funlora_B": torch.tensor(B)[None],
        f"base_model.model.{layer}.funlora_alpha": torch.zeros(3),
        "base_model.model.class_embedding.funlora_class_vector": torch.zeros(4),
    }


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_factors_that_are_not_finite_have_no_importance(number):
    with pytest.raises(ValueError, match=r"Factors of the layer 'up\.conv' are not finite"):
        layer_importance([state([2.0], [2.0]), state([number], [2.0])])


def test_importance_is_equation_20():
    A, B = np.array([1.5, 0.0, 1.0]), np.array([1.0, -1.0])
    expected = (np.abs(A - 1).sum() + np.abs(B - 1).sum()) / 5
    result = layer_importance(state(A.tolist(), B.tolist()))
    assert list(result) == ["up.conv"]
    np.testing.assert_allclose(result["up.conv"], [expected, 0])


def test_importance_over_classes_is_equation_21_in_the_order_given(tmp_path):
    folders, states = [], []
    for class_id, value in ((1, 2.0), (2, 4.0)):
        states.append(state([value], [value]) | state([1.0], [value], layer="down.conv"))
        folders.append(tmp_path / str(class_id))
        folders[-1].mkdir()
        save_file(states[-1], folders[-1] / "adapter_model.safetensors")
    result = layer_importance(folders, order=["down.conv", "no.such", "up.conv"])
    assert list(result) == ["down.conv", "up.conv"]
    np.testing.assert_allclose(result["up.conv"], (np.mean([1, 3]), np.std([1, 3])))
    np.testing.assert_allclose(result["down.conv"], (np.mean([0.5, 1.5]), np.std([0.5, 1.5])))
    # Folders as text and state dicts are the same; a layer that the order does not name comes last.
    assert layer_importance([str(folder) for folder in folders]) == result
    assert list(layer_importance(states, order=["up.conv"])) == ["up.conv", "down.conv"]
    assert layer_importance(folders[0]) == layer_importance(states[0]) == layer_importance([folders[0]])


def test_a_class_that_lacks_a_layer_does_not_count_for_it():
    result = layer_importance([state([2.0], [2.0]), state([3.0], [3.0], layer="down.conv")])
    assert result == {"up.conv": LayerImportance(1.0, 0.0), "down.conv": LayerImportance(2.0, 0.0)}


def test_an_adapter_as_it_starts_has_no_importance(tiny_unet):
    for config in (FunLoraConfig(), FunLoraConfig(r=3), FunLoraConfig(function="identity", operation="mul-add")):
        model = get_peft_model(copy.deepcopy(tiny_unet), config)
        assert set(layer_importance(model).values()) == {(0.0, 0.0)}


def test_importance_in_a_model_is_that_of_its_saved_adapters(tiny_unet, tmp_path):
    names = select_layers(tiny_unet, "decoder")
    model = get_peft_model(
        tiny_unet, FunLoraConfig(target_modules=names, class_embedding="class_embedding"), adapter_name="class_2"
    )
    model.add_adapter("class_3", FunLoraConfig(target_modules=names[:2], init_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "funlora_" in name:
                parameter += torch.rand_like(parameter)
    found = layer_importance(model)
    assert list(found) == names
    states = [get_peft_model_state_dict(model, adapter_name=name) for name in ("class_2", "class_3")]
    assert found == layer_importance(states, order=names)
    model.save_pretrained(tmp_path)
    assert found == layer_importance([tmp_path / "class_2", tmp_path / "class_3"], order=names)
    # Also while merged, in the bare U-Net, and in the order asked for.
    model.merge_adapter(["class_2"])
    assert layer_importance(model.base_model.model) == found
    assert list(layer_importance(model, order=names[::-1])) == names[::-1]
    assert all(value.std == 0 for value in list(found.values())[2:])


def test_importance_of_injected_layers_of_other_models():
    model = inject_adapter_in_model(FunLoraConfig(target_modules=["last", "linear"], init_weights=False), Other())
    assert list(layer_importance(model)) == ["last", "linear"]
    assert isinstance(get_peft_model(Other(), FunLoraConfig(target_modules=["last"])).base_model, FunLoraModel)


def test_nothing_adapted_has_no_importance(tiny_unet):
    assert layer_importance(tiny_unet) == {}
    assert layer_importance([]) == {}
    vector = FunLoraConfig(target_modules=set(), class_embedding="class_embedding")
    assert layer_importance(get_peft_model(tiny_unet, vector)) == {}


def test_importance_chooses_layers_for_a_budget(tiny_unet):
    config = FunLoraConfig(target_modules="all-conv", function="identity", init_weights=False)
    model = get_peft_model(tiny_unet, config)
    assert isinstance(model, PeftModel)
    importance = layer_importance(model)
    best = max(importance, key=lambda layer: importance[layer].mean)
    cost = parameters_per_class(tiny_unet, FunLoraConfig(function="identity", target_modules=[best])).without_vector
    chosen = select_layers(model, f"<= {cost} per class", importance=importance, config=config)
    assert chosen == [best]


def test_a_folder_without_adapter_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        layer_importance([tmp_path])
