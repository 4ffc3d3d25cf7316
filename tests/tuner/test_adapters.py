"""Adapters in a model: adding, deleting, activating, disabling, several at once, their scale, copies of the model."""

import copy
import pickle
import warnings

import pytest
import torch
from diffusers.utils.peft_utils import scale_lora_layers, set_weights_and_activate_adapters, unscale_lora_layers
from peft import get_model_status, get_peft_model, inject_adapter_in_model
from peft_models import (
    CONDITION_UNET,
    UNET,
    adapter_parameters,
    adapter_state,
    assert_equal,
    base_weights,
    close,
    differ,
    funlora_layers,
    kinds,
)
from torch import nn

from funlora_hf import FunLoraConfig
from funlora_hf.tuner import FunLoraClassVector


OPERATIONS = pytest.mark.parametrize("operation", ["mul", "add", "mul-add"])
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
]
COPIERS = pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])


def set_scale(model, adapter, scale):
    for layer in funlora_layers(model):
        layer.set_scale(adapter, scale)


# Add, delete, activate, disable


@kinds
def test_disabled_adapters_give_the_base(kind):
    expected = kind.run(kind.base())
    model = kind.model("x", "y")
    changed = kind.run(model)
    assert differ(changed, expected)
    with model.disable_adapter():
        assert torch.equal(kind.run(model), expected)
        model.set_adapter("y")
    assert differ(kind.run(model), expected)
    model.set_adapter("x")
    assert torch.equal(kind.run(model), changed)


@kinds
def test_adding_an_adapter_leaves_the_others_alone(kind):
    model = kind.model("x")
    before, expected = {n: p.clone() for n, p in adapter_parameters(model, "x").items()}, kind.run(model)
    model.add_adapter("y", kind.config(function="shift"))
    assert_equal(adapter_parameters(model, "x"), before)
    assert torch.equal(kind.run(model), expected)
    assert not any(p.requires_grad for p in adapter_parameters(model, "y").values())
    assert all(p.requires_grad for p in adapter_parameters(model, "x").values())
    model.set_adapter("y")
    assert all(p.requires_grad for p in adapter_parameters(model, "y").values())
    assert not any(p.requires_grad for p in adapter_parameters(model, "x").values())
    assert differ(kind.run(model), expected)
    model.set_adapter("x")
    assert torch.equal(kind.run(model), expected)


@kinds
def test_adapters_on_different_layers(kind):
    layers = (nn.Conv2d, nn.Linear)
    first, *others = [name for name, module in kind.base().named_modules() if isinstance(module, layers)]
    model = kind.model("x", target_modules=[first], class_embedding=None)
    expected = kind.run(model)
    model.add_adapter("y", kind.config(target_modules=others))
    assert torch.equal(kind.run(model), expected)
    assert all(p.requires_grad for p in adapter_parameters(model, "x").values())
    assert not any(p.requires_grad for p in adapter_parameters(model, "y").values())
    together = kind.run(model, adapter_names=["x", "y", "__base__"])
    for index, name in enumerate("xy"):
        model.set_adapter(name)
        close(together[index], kind.run(model)[index])
    with model.disable_adapter():
        close(together[2], kind.run(model)[2])


@kinds
def test_deleting_the_active_adapter_activates_another(kind):
    model = kind.model("x", "y", "z")
    model.set_adapter("y")
    expected = kind.run(model)
    model.set_adapter("x")
    with pytest.warns(UserWarning, match="Adapter x was active which is now deleted. Setting active adapter to y"):
        model.delete_adapter("x")
    assert not adapter_parameters(model, "x")
    assert all("x" not in layer.settings and "x" not in layer.scaling for layer in funlora_layers(model))
    assert list(model.peft_config) == ["y", "z"]
    assert model.active_adapters == get_model_status(model).active_adapters == ["y"]
    assert torch.equal(kind.run(model), expected)
    with pytest.raises(ValueError, match=r"\bx\b"):
        model.set_adapter("x")
    with pytest.raises(ValueError, match="x does not exist"):
        model.delete_adapter("x")


@kinds
def test_deleting_an_inactive_adapter_changes_nothing(kind):
    model = kind.model("x", "y")
    expected = kind.run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter("y")
    assert model.active_adapters == ["x"]
    assert torch.equal(kind.run(model), expected)
    assert not adapter_parameters(model, "y")


@kinds
def test_deleting_every_adapter_leaves_the_base(kind):
    model = kind.model("x")
    model.delete_adapter("x")
    assert torch.equal(kind.run(model.base_model.model), kind.run(kind.base()))


@kinds
def test_an_adapter_may_come_again_under_the_name_of_a_deleted_one(kind):
    model = kind.model("x", "y")
    set_scale(model, "y", 0.5)
    model.delete_adapter("y")
    torch.manual_seed(9)
    model.add_adapter("y", kind.config(function="power"))
    model.set_adapter("y")
    expected = kind.run(kind.model("y", seed=9, function="power"))
    assert torch.equal(kind.run(model), expected)


# Several at once


@kinds
@OPERATIONS
def test_several_active_adapters(kind, operation):
    """For mul the factors multiply, for add the terms sum, and class vectors average."""
    model = kind.model("x", "y", operation=operation)
    base = kind.base()
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if layer not in funlora_layers(model):
                continue
            weight = base.get_submodule(name).weight
            if isinstance(layer, FunLoraClassVector):
                vectors = [layer.funlora_class_vector[adapter] for adapter in "xy"]
                weight.copy_((vectors[0] + vectors[1]) / 2)
                continue
            F = [layer.functional_matrix(adapter) for adapter in "xy"]
            if operation == "mul-add":
                G = [layer.functional_matrix(adapter, "add_") for adapter in "xy"]
                weight.copy_(weight * F[0] * F[1] + G[0] + G[1])
            else:
                weight.copy_(weight * F[0] * F[1] if operation == "mul" else weight + F[0] + F[1])
    model.base_model.set_adapter(["x", "y"])
    assert get_model_status(model).active_adapters == ["x", "y"]
    both = kind.run(model)
    close(both, kind.run(base), 1e-4)
    model.base_model.set_adapter(["y", "x"])
    close(kind.run(model), both, 1e-4)
    for name in "xy":
        model.set_adapter(name)
        assert differ(kind.run(model), both)


@kinds
def test_training_one_adapter_changes_no_other(kind):
    model = kind.model("x", "y")
    before = kind.run(model)
    weights = base_weights(model)
    model.set_adapter("y")
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        result = model(**kind.batch())
        (result if isinstance(result, torch.Tensor) else result.sample).square().mean().backward()
        optimizer.step()
    model.eval()
    changed = kind.run(model)
    model.set_adapter("x")
    assert torch.equal(kind.run(model), before)
    assert differ(changed, before)
    assert_equal(base_weights(model), weights)


# Scale


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_is_finite(scale, tiny_unet):
    model = get_peft_model(tiny_unet, FunLoraConfig())
    with pytest.raises(ValueError, match=f"`scale` is {scale}, expected a finite number"):
        set_scale(model, "default", scale)


@kinds
@OPERATIONS
def test_scale_blends_from_the_base(kind, operation):
    base, model = kind.base(), kind.model(operation=operation)
    original, trained = kind.run(base), kind.run(model)
    set_scale(model, "default", 0)
    close(kind.run(model), original)
    for scale in (0.3, 1.5, -0.5):
        set_scale(model, "default", scale)
        with torch.no_grad():
            for name, layer in model.base_model.model.named_modules():
                if layer in funlora_layers(model):
                    weight = layer.get_base_layer().weight
                    vector = isinstance(layer, FunLoraClassVector)
                    adapted = layer.funlora_class_vector["default"].expand_as(weight) if vector else None
                    if adapted is None:
                        F = layer.functional_matrix("default")
                        adapted = {"mul": weight * F, "add": weight + F}.get(operation)
                        if adapted is None:
                            adapted = weight * F + layer.functional_matrix("default", "add_")
                    base.get_submodule(name).weight.copy_(weight + scale * (adapted - weight))
        close(kind.run(model), kind.run(base), 1e-4)
    set_scale(model, "default", 1)
    assert torch.equal(kind.run(model), trained)


@kinds
def test_at_scale_1_the_label_is_not_read(kind):
    inputs = {**kind.batch(), "class_labels": torch.tensor([1000, -5, 2])}
    model = kind.model()
    expected = kind.run(model, inputs)
    set_scale(model, "default", 0.5)
    with pytest.raises(IndexError):
        kind.run(model, inputs)
    for layer in funlora_layers(model):
        layer.unscale_layer()
    assert torch.equal(kind.run(model, inputs), expected)


@kinds
def test_scale_layer_multiplies_and_unscale_layer_divides_or_restores(kind):
    model = kind.model("x", "y")
    for layer in funlora_layers(model):
        layer.scale_layer(0.5)
        layer.scale_layer(0.5)
        assert layer.scaling == {"x": 0.25, "y": 1.0}  # only the active one
        layer.set_scale("y", 3.0)
        layer.unscale_layer(0.5)
        assert layer.scaling == {"x": 0.5, "y": 3.0}
        layer.unscale_layer()
        assert layer.scaling == {"x": 1.0, "y": 3.0}
        layer.set_scale("no_such_adapter", 2.0)  # as PEFT's layers, which need not have every adapter
        assert layer.scaling == {"x": 1.0, "y": 3.0}
    model.set_adapter("y")
    scaled = kind.run(model)
    for layer in funlora_layers(model):
        layer.unscale_layer()
    assert differ(kind.run(model), scaled)


@kinds
@OPERATIONS
def test_scales_of_several_adapters(kind, operation):
    model = kind.model("x", "y", operation=operation)
    model.base_model.set_adapter(["x", "y"])
    both = kind.run(model)
    set_scale(model, "y", 0)
    # Class vectors average, so that a second one at scale 0 pulls halfway to the base's row.
    for layer in funlora_layers(model):
        if isinstance(layer, FunLoraClassVector):
            layer.set_adapter("x")
    muted = kind.run(model)
    model.set_adapter("x")
    close(muted, kind.run(model), 1e-4)
    assert differ(muted, both)


@kinds
def test_scales_in_a_mixed_batch(kind):
    model = kind.model("x", "y")
    set_scale(model, "y", 0.5)
    names = ["x", "y", "__base__"]
    together = kind.run(model, adapter_names=names)
    for index, name in enumerate(names[:2]):
        model.set_adapter(name)
        close(together[index], kind.run(model)[index], 1e-4)
    close(together[2], kind.run(kind.base())[2], 1e-4)


@kinds
@OPERATIONS
def test_scale_and_merging(kind, operation):
    model = kind.model("x", "y", operation=operation)
    before = base_weights(model)
    set_scale(model, "x", 0.5)
    halved = kind.run(model)
    assert differ(halved, kind.run(kind.model("x", operation=operation)))
    model.merge_adapter()
    close(kind.run(model), halved, 1e-4)
    set_scale(model, "x", 2.0)  # while merged
    doubled = kind.run(model)
    assert get_model_status(model).merged_adapters == ["x"]
    model.unmerge_adapter()
    assert_equal(base_weights(model), before)
    close(kind.run(model), doubled, 1e-4)
    assert differ(doubled, halved)


@kinds
def test_scale_is_not_saved_and_starts_at_1(kind, tmp_path):
    model = kind.model()
    expected, state = kind.run(model), adapter_state(model)
    set_scale(model, "default", 0.2)
    assert_equal(adapter_state(model), state)
    model.save_pretrained(tmp_path)
    other = kind.model(seed=5)
    set_scale(other, "default", 0.2)
    other.load_adapter(tmp_path, "loaded")
    other.set_adapter("loaded")
    assert torch.equal(kind.run(other.eval()), expected)


@kinds
def test_disabled_adapters_keep_their_scale(kind):
    model = kind.model()
    set_scale(model, "default", 0.5)
    expected = kind.run(model)
    with model.disable_adapter():
        assert torch.equal(kind.run(model), kind.run(kind.base()))
    assert torch.equal(kind.run(model), expected)


def test_delta_weight_is_scaled():
    model = UNET.model()
    layer = funlora_layers(model)[0]
    whole = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    close(layer.get_delta_weight("default"), whole / 2, 1e-6)


# As diffusers calls it


@kinds
def test_diffusers_functions_for_lora_layers(kind):
    base = kind.base()
    original = kind.run(base)
    for name in "xy":
        torch.manual_seed(ord(name))
        inject_adapter_in_model(kind.config(), base, adapter_name=name)
    set_weights_and_activate_adapters(base, ["y"], [1.0])
    trained = kind.run(base)
    set_weights_and_activate_adapters(base, ["y"], [0.5])
    halved = kind.run(base)
    assert differ(halved, trained)
    set_weights_and_activate_adapters(base, ["y"], [1.0])
    scale_lora_layers(base, 0.5)
    assert torch.equal(kind.run(base), halved)
    unscale_lora_layers(base, 0.5)
    assert torch.equal(kind.run(base), trained)
    scale_lora_layers(base, 0.0)
    close(kind.run(base), original)
    unscale_lora_layers(base, 0.0)
    assert torch.equal(kind.run(base), trained)


def test_diffusers_adapter_mixin():
    """A UNet2DConditionModel has diffusers' own methods for adapters."""
    kind = CONDITION_UNET
    unet = kind.base()
    original = kind.run(unet)
    for name in "xy":
        torch.manual_seed(ord(name))
        unet.add_adapter(kind.config(), adapter_name=name)
    trained = kind.run(unet)
    assert unet.active_adapters() == ["y"]
    unet.disable_adapters()
    assert torch.equal(kind.run(unet), original)
    unet.enable_adapters()
    assert torch.equal(kind.run(unet), trained)
    halved = kind.run(unet, cross_attention_kwargs={"scale": 0.5})
    assert differ(halved, trained)
    assert torch.equal(kind.run(unet), trained)
    unet.set_adapters(["y"], 0.5)
    assert torch.equal(kind.run(unet), halved)
    unet.set_adapters(["x", "y"])
    both = kind.run(unet)
    before = base_weights(unet)
    unet.fuse_lora(lora_scale=1.0, adapter_names=["x", "y"])
    close(kind.run(unet), both, 1e-4)
    unet.unfuse_lora()
    assert_equal(base_weights(unet), before)
    assert torch.equal(kind.run(unet), both)
    unet.delete_adapters("x")
    unet.set_adapters(["y"])
    assert torch.equal(kind.run(unet), trained)


# Copies


@kinds
@COPIERS
def test_copies_are_equal_and_independent(kind, copier):
    model = kind.model("x", "y", modules_to_save=[kind.whole])
    set_scale(model, "x", 0.5)
    expected = kind.run(model)
    other = copier(model)
    assert torch.equal(kind.run(other), expected)
    set_scale(other, "x", 0)
    with torch.no_grad():
        for parameter in adapter_parameters(other, "x").values():
            parameter.zero_()
    other.set_adapter("y")
    assert differ(kind.run(other), expected)
    assert torch.equal(kind.run(model), expected)
    assert model.active_adapters == ["x"]


@kinds
@COPIERS
def test_copies_of_a_merged_model_unmerge_exactly(kind, copier):
    model = kind.model("x", "y")
    before, expected = base_weights(model), kind.run(model)
    set_scale(model, "y", 0.5)
    model.merge_adapter(["x"])
    model.merge_adapter(["y"])
    merged, output = base_weights(model), kind.run(model)
    other = copier(model)
    assert torch.equal(kind.run(other), output)
    other.unmerge_adapter()
    assert_equal(base_weights(other), before)
    assert torch.equal(kind.run(other), expected)
    assert_equal(base_weights(model), merged)
    model.unmerge_adapter()
    assert_equal(base_weights(model), before)


def test_a_copy_of_an_unloaded_adapter_config_is_enough_to_add_it_again():
    model = UNET.model()
    config = copy.deepcopy(model.peft_config["default"])
    assert isinstance(config, FunLoraConfig)
    model.add_adapter("again", config)
    assert {name.replace(".again", "") for name in adapter_parameters(model, "again")} == {
        name.replace(".default", "") for name in adapter_parameters(model)
    }
