"""FunLoraModel on small U-Nets: PEFT's life cycle, merging, mixed batches, training, errors."""

import copy
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel
from peft import (
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from funlora_hf import FunLoraConfig, FunLoraModel, mixed_batch
from funlora_hf.tuner import FunLoraClassVector, FunLoraConv2d, FunLoraLayer, FunLoraLinear


EMBEDDING = "class_embedding"


def make_unet(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "num_class_embeds": 2,
    }
    return UNet2DModel(**{**config, **changes}).eval()


def make_model(*adapters, unet=None, seed=1, **config):
    """A PeftModel with one adapter of random weights for every name; the first is active."""
    config = {"init_weights": False, "class_embedding": EMBEDDING, **config}
    torch.manual_seed(seed)
    first, *others = adapters or ("default",)
    model = get_peft_model(make_unet() if unet is None else unet, FunLoraConfig(**config), adapter_name=first)
    for name in others:
        model.add_adapter(name, FunLoraConfig(**config))
    return model.eval()


def batch(size=3):
    generator = torch.Generator().manual_seed(2)
    return {
        "sample": torch.randn(size, 3, 8, 8, generator=generator),
        "timestep": 1000 * torch.rand(size, generator=generator),
        "class_labels": torch.arange(size) % 2,
    }


def run(model, inputs=None, **kwargs):
    with torch.no_grad():
        return model(**(batch() if inputs is None else inputs), **kwargs).sample


def funlora_layers(model):
    return [module for module in model.modules() if isinstance(module, FunLoraLayer)]


def adapter_parameters(model, adapter="default"):
    return {name: p for name, p in model.named_parameters() if "funlora_" in name and name.endswith(f".{adapter}")}


def base_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "funlora_" not in name}


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# Wrapping


@pytest.mark.parametrize("operation", ["mul", "add", "mul-add"])
@pytest.mark.parametrize("function", ["cosine", "power", "shift", "identity"])
def test_starts_as_the_base_but_for_the_class(function, operation):
    unet = make_unet()
    inputs = batch()
    expected = run(unet, inputs)
    model = make_model(unet=unet, init_weights=True, class_embedding=None, function=function, operation=operation)
    close(run(model, inputs), expected)
    assert (run(make_model(function=function, operation=operation), inputs) - expected).abs().max() > 1e-3


def test_only_the_adapter_is_trainable():
    model = make_model()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model))
    assert trainable
    status = get_model_status(model)
    assert status.peft_types == {"default": "FUNLORA"}
    assert status.num_adapter_layers == len(funlora_layers(model)) == 8  # 7 convolutions and the class vector
    assert status.requires_grad == {"default": True}


def test_class_label_does_not_matter_to_an_adapter():
    model = make_model()
    inputs = batch()
    other = {**inputs, "class_labels": torch.tensor([1000, 5, 2])}  # the base knows two classes
    assert torch.equal(run(model, inputs), run(model, other))
    without = make_model(class_embedding=None)
    assert not torch.equal(run(without, inputs), run(without, {**inputs, "class_labels": 1 - inputs["class_labels"]}))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_low_precision_base_keeps_float32_adapters_unless_asked(autocast_adapter_dtype):
    unet = make_unet().to(torch.bfloat16)
    inputs = {name: x if name == "class_labels" else x.to(torch.bfloat16) for name, x in batch().items()}
    expected = run(unet, inputs)
    model = get_peft_model(unet, FunLoraConfig(), autocast_adapter_dtype=autocast_adapter_dtype)
    dtype = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for p in adapter_parameters(model).values()} == {dtype}
    assert all(p.requires_grad for p in adapter_parameters(model).values())
    if autocast_adapter_dtype:
        assert torch.equal(run(model, inputs), expected)
    else:  # alpha is rounded, so the start is the identity to bfloat16's precision only
        torch.testing.assert_close(run(model, inputs), expected, rtol=0.05, atol=0.05)


def test_attention_is_adapted_too():
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = make_model(
        "x", "y", unet=make_unet(**kinds), target_modules=["to_q", "to_out.0", "time_embedding.linear_1"]
    )
    kinds = [type(layer) for layer in funlora_layers(model)]
    assert kinds.count(FunLoraLinear) == 9  # four attentions of two layers each, and the time embedding
    assert kinds.count(FunLoraConv2d) == 0
    together = run(model, adapter_names=["x", "y", "x"])
    model.set_adapter("y")
    close(together[1], run(model)[1])


# Targets


def adapted_names(model):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, FunLoraLayer) and not isinstance(module, FunLoraClassVector)
    }


def all_convolutions():
    return {name for name, module in make_unet().named_modules() if isinstance(module, nn.Conv2d)}


def is_first_of_up_block(name):
    return name.startswith("up_blocks.") and name.endswith(("resnets.0.conv1", "resnets.0.conv2"))


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        ({"target_modules": "all-conv"}, lambda name: True),
        ({"target_modules": r"up_blocks\.\d+\.resnets\.0\.conv[12]"}, is_first_of_up_block),
        ({"target_modules": ["conv1", "conv_in"]}, lambda name: name.endswith(("conv1", "conv_in"))),
        (
            {"target_modules": "all-conv", "exclude_modules": ["conv1", "conv_out"]},
            lambda n: not n.endswith(("1", "out")),
        ),
        ({"target_modules": "all-conv", "exclude_modules": r"(up|down|mid)_.*"}, lambda name: "block" not in name),
        (
            {"target_modules": ["conv1", "conv2"], "layers_to_transform": [1], "layers_pattern": "resnets"},
            lambda name: "resnets.1.conv" in name and "shortcut" not in name,
        ),
    ],
    ids=["all-conv", "regex", "suffixes", "exclude list", "exclude regex", "indexes"],
)
@pytest.mark.parametrize("class_embedding", [None, EMBEDDING])
def test_target_modules(config, chosen, class_embedding):
    model = make_model(class_embedding=class_embedding, **config)
    expected = {name for name in all_convolutions() if chosen(name)}
    assert expected
    assert adapted_names(model) == expected
    assert isinstance(model.base_model.model.class_embedding, FunLoraClassVector) is (class_embedding is not None)


def test_default_target_is_the_middle_of_the_decoder():
    model = make_model()
    names = adapted_names(model)
    assert names == set(model.peft_config["default"].target_modules)
    assert {name.split(".")[0] for name in names} == {"up_blocks"}


def test_target_modules_must_be_given_for_other_models():
    with pytest.raises(ValueError, match=r"target_modules.*Sequential"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 3)), FunLoraConfig())


def test_other_models_work_with_targets():
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 3, 4, 4)
    expected = base(x)
    model = get_peft_model(base, FunLoraConfig(target_modules=["0", "2"]))
    assert adapted_names(model) == {"0", "2"}
    close(model(x), expected)


@pytest.mark.parametrize("target", ["conv_norm_out", "time_proj"])
def test_unsupported_module(target):
    with pytest.raises(ValueError, match="not supported") as error:
        make_model(target_modules=[target])
    assert "torch.nn.Conv2d" in str(error.value)


def test_transposed_convolution_is_unsupported():
    with pytest.raises(ValueError, match=r"ConvTranspose2d.*not supported"):
        get_peft_model(nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), FunLoraConfig(target_modules=["0"]))


def test_unknown_target():
    with pytest.raises(ValueError, match="no_such_module"):
        make_model(target_modules=["no_such_module"], class_embedding=None)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize(
    ("lora_target", "config"),
    [("conv1", {"target_modules": ["conv1"]}), ("class_embedding", {"class_embedding": EMBEDDING})],
    ids=["convolution", "class embedding"],
)
def test_a_layer_with_another_methods_adapter_is_refused(lora_target, config):
    unet = make_unet()
    get_peft_model(unet, LoraConfig(target_modules=[lora_target]))
    with pytest.raises(ValueError, match="another method"):
        get_peft_model(unet, FunLoraConfig(**config))


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
        make_model(unet=make_unet(**changes), class_embedding=name)
    for word in words:
        assert word in str(error.value)


# Files


def test_save_and_load_is_equal_to_the_bit(tmp_path):
    model = make_model(operation="mul-add", r=2, ratio=3, modules_to_save=["conv_out"])
    with torch.no_grad():
        model.base_model.model.conv_out.weight.add_(1)
    expected = run(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(make_unet(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert {p.device.type for p in loaded.parameters()} == {"cpu"}
        assert not any(p.requires_grad for p in loaded.parameters())
        assert_equal(adapter_parameters(loaded), adapter_parameters(model))
        assert torch.equal(run(loaded), expected)


@pytest.mark.parametrize("function", ["cosine", "shift", "identity"])
def test_file_holds_the_adapter_and_nothing_else(tmp_path, function):
    model = make_model("default", "other", function=function)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = {name.removesuffix(".default"): p for name, p in adapter_parameters(model).items()}
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name])


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("before", "merged")]
    assert files[0] == files[1]


def test_files_do_not_depend_on_the_hash_seed(tmp_path):
    script = (
        "import sys, torch; from diffusers import UNet2DModel; from peft import get_peft_model; "
        "from funlora_hf import FunLoraConfig; torch.set_num_threads(1); torch.manual_seed(0); "
        "unet = UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, num_class_embeds=2, "
        "down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2); "
        "config = FunLoraConfig(class_embedding='class_embedding', exclude_modules=['conv_in', 'conv_out', 'conv2']); "
        "model = get_peft_model(unet, config); model.save_pretrained(sys.argv[1]); "
        "model.add_adapter('all', FunLoraConfig(target_modules='all-conv')); model.save_pretrained(sys.argv[1])"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / seed)], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    for name in ("adapter_config.json", "adapter_model.safetensors", "all/adapter_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_inject_adapter_in_model_and_state_dict():
    source = make_model(init_weights=False)
    expected = run(source)
    for low_cpu_mem_usage in (False, True):
        unet = make_unet()
        config = FunLoraConfig(class_embedding=EMBEDDING)
        assert inject_adapter_in_model(config, unet, low_cpu_mem_usage=low_cpu_mem_usage) is unet
        state = {
            name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(source).items()
        }
        result = set_peft_model_state_dict(unet, state, low_cpu_mem_usage=low_cpu_mem_usage)
        assert result.unexpected_keys == []
        assert torch.equal(run(unet), expected)


# Adapters: add, delete, activate, disable


def test_disabled_adapter_gives_the_base():
    expected = run(make_unet())
    model = make_model()
    assert not torch.equal(run(model), expected)
    with model.disable_adapter():
        assert torch.equal(run(model), expected)
    assert not torch.equal(run(model), expected)


def test_add_adapter_leaves_the_others_alone():
    model = make_model("x")
    before, expected = {n: p.clone() for n, p in adapter_parameters(model, "x").items()}, run(model)
    model.add_adapter("y", FunLoraConfig(init_weights=False, class_embedding=EMBEDDING, function="shift"))
    assert_equal(adapter_parameters(model, "x"), before)
    assert torch.equal(run(model), expected)
    assert not any(p.requires_grad for p in adapter_parameters(model, "y").values())
    assert all(p.requires_grad for p in adapter_parameters(model, "x").values())
    model.set_adapter("y")
    assert all(p.requires_grad for p in adapter_parameters(model, "y").values())
    assert not any(p.requires_grad for p in adapter_parameters(model, "x").values())
    assert not torch.equal(run(model), expected)


def test_adapters_on_different_layers():
    model = make_model("x", target_modules=["conv_in"], class_embedding=None)
    expected = run(model)
    torch.manual_seed(3)
    model.add_adapter("y", FunLoraConfig(init_weights=False, target_modules=["conv_out"], class_embedding=EMBEDDING))
    assert torch.equal(run(model), expected)
    assert all(p.requires_grad for p in adapter_parameters(model, "x").values())
    assert not any(p.requires_grad for p in adapter_parameters(model, "y").values())
    together = run(model, adapter_names=["x", "y", "__base__"])
    for index, name in enumerate("xy"):
        model.set_adapter(name)
        close(together[index], run(model)[index])
    with model.disable_adapter():
        close(together[2], run(model)[2])


@pytest.mark.filterwarnings("ignore:Adapter x was active which is now deleted")
def test_delete_adapter():
    model = make_model("x", "y")
    expected = run(make_model("x", "y"), adapter_names=["y", "y", "y"])
    model.delete_adapter("x")
    assert not adapter_parameters(model, "x")
    assert all("x" not in layer.settings for layer in funlora_layers(model))
    assert list(model.peft_config) == ["y"]
    assert model.active_adapters == ["y"]
    assert torch.equal(run(model), expected)
    with pytest.raises(ValueError, match=r"'?x'?\b"):
        model.set_adapter("x")


@pytest.mark.parametrize("operation", ["mul", "add", "mul-add"])
def test_several_active_adapters(operation):
    model = make_model("x", "y", operation=operation)
    layer = next(layer for layer in funlora_layers(model) if isinstance(layer, FunLoraConv2d))
    W = layer.weight.detach()
    model.base_model.set_adapter(["x", "y"])
    F = {name: layer.functional_matrix(name).detach() for name in "xy"}
    if operation == "mul":
        expected = W * F["x"] * F["y"]
    elif operation == "add":
        expected = W + F["x"] + F["y"]
    else:
        expected = W * F["x"] * F["y"] + sum(layer.functional_matrix(name, "add_").detach() for name in "xy")
    outputs = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append((args[0], output)))
    both = run(model)
    handle.remove()
    x, output = outputs[0]
    close(output, nn.functional.conv2d(x, expected, layer.get_base_layer().bias, padding=1))
    model.base_model.set_adapter(["y", "x"])
    close(run(model), both)
    for name in "xy":
        model.base_model.set_adapter([name])
        assert (run(model) - both).abs().max() > 1e-3


def test_zero_forgetting():
    model = make_model("x", "y")
    before = run(model)
    model.set_adapter("y")
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch()).sample.square().mean().backward()
        optimizer.step()
    model.eval()
    changed = run(model)
    model.set_adapter("x")
    assert torch.equal(run(model), before)
    assert not torch.equal(changed, before)


# Merging


@pytest.mark.parametrize("names", [["x"], ["x", "y"]])
def test_merge_and_unmerge_are_exact(names):
    model = make_model("x", "y")
    before = base_weights(model)
    model.base_model.set_adapter(names)
    expected = run(model)
    model.merge_adapter()
    assert all(layer.merged_adapters == names for layer in funlora_layers(model))
    merged = base_weights(model)
    assert any(not torch.equal(merged[name], before[name]) for name in before)
    close(run(model), expected)
    model.unmerge_adapter()
    assert_equal(base_weights(model), before)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_merged_model_unmerge_exactly(copier):
    model = make_model()
    before, expected = base_weights(model), run(model)
    model.merge_adapter()
    merged = base_weights(model)
    other = copier(model)
    other.unmerge_adapter()
    assert_equal(base_weights(other), before)
    assert torch.equal(run(other), expected)
    assert_equal(base_weights(model), merged)
    model.unmerge_adapter()
    assert_equal(base_weights(model), before)


def test_safe_merge_refuses_and_changes_nothing():
    model = make_model()
    before = base_weights(model)
    last = funlora_layers(model)[-1]  # the layers before it are sound
    with torch.no_grad():
        last.funlora_alpha["default"][0] = float("nan")
    with pytest.raises(ValueError, match="broken"):
        model.merge_adapter(safe_merge=True)
    assert_equal(base_weights(model), before)
    assert not any(layer.merged for layer in funlora_layers(model))


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(safe_merge):
    unet = make_unet()
    names = [name for name, _ in unet.named_parameters()]
    model = make_model(unet=unet)
    inputs = batch()
    expected = run(model, inputs)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is UNet2DModel
    assert not funlora_layers(merged)
    assert [name for name, _ in merged.named_parameters()] == names
    close(run(merged, inputs), expected)
    assert {type(module) for module in merged.modules()} == {type(module) for module in make_unet().modules()}


def test_unload_gives_the_base_back():
    before = dict(make_unet().named_parameters())
    model = make_model()
    unet = model.unload()
    assert not funlora_layers(unet)
    assert_equal(dict(unet.named_parameters()), before)


# Mixed batches

MIXES = [["x", "y", "__base__", "x", "y"], ["x", "y", "__base__"], ["y", "y", "x"], ["__base__"] * 3, ["y"] * 3]


def alone(model, names, inputs):
    """Every sample by itself with its adapter switched on."""
    outputs = []
    for index, name in enumerate(names):
        sample = {key: value[index : index + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(run(model, sample))
        else:
            model.set_adapter(name)
            outputs.append(run(model, sample))
    return torch.cat(outputs)


@pytest.mark.parametrize("names", MIXES)
@pytest.mark.parametrize("operation", ["mul", "mul-add"])
def test_mixed_batch_equals_each_sample_alone(names, operation):
    model = make_model("x", "y", operation=operation)
    inputs = batch(len(names))
    close(run(model, inputs, adapter_names=names), alone(model, names, inputs))
    assert hooks(model) == 0


def test_mixed_batch_follows_any_order():
    model = make_model("x", "y", "z")
    inputs = batch(4)
    for names in itertools.permutations("xyzx"):
        close(run(model, inputs, adapter_names=list(names)), alone(model, names, inputs))


def test_mixed_batch_with_modules_to_save():
    model = make_model("x", "y", modules_to_save=["conv_out"])
    with torch.no_grad():
        for factor, name in ((2, "x"), (3, "y")):
            model.base_model.model.conv_out.modules_to_save[name].weight.mul_(factor)
    inputs, names = batch(5), ["x", "y", "__base__", "x", "y"]
    close(run(model, inputs, adapter_names=names), alone(model, names, inputs))


def test_mixed_batch_context_on_a_bare_unet():
    model = make_model("x", "y")
    inputs, names = batch(4), ["y", "__base__", "x", "y"]
    expected = alone(model, names, inputs)
    unet = model.base_model.model
    with mixed_batch(unet, names):
        close(run(unet, inputs), expected)
    assert hooks(model) == 0


@pytest.mark.parametrize("names", [["x", "no_such_adapter", "y"], ["X", "x", "x"]])
def test_mixed_batch_refuses_unknown_names(names):
    model = make_model("x", "y")
    unknown = next(name for name in names if name not in "xy")
    with pytest.raises(ValueError, match=unknown):
        run(model, adapter_names=names)
    assert hooks(model) == 0


@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_mixed_batch_refuses_another_length(length):
    model = make_model("x", "y")
    expected = run(model)
    with pytest.raises(ValueError, match=rf"(?s)adapter_names.*{length} and 3"):
        run(model, adapter_names=["y"] * length)
    assert hooks(model) == 0
    assert torch.equal(run(model), expected)


def test_mixed_batch_refuses_training_mode():
    model = make_model("x", "y").train()
    with pytest.raises(ValueError, match=r"training.*\n?.*mixed_batch"):
        run(model, adapter_names=["x", "y", "x"])
    assert hooks(model) == 0


def test_mixed_batch_refuses_merged_adapters():
    model = make_model("x", "y")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        run(model, adapter_names=["x", "y", "x"])


def test_hooks_go_with_any_exception():
    model = make_model("x", "y")
    expected = run(model)

    def fail_inside():
        with mixed_batch(model, ["y", "y", "y"]):
            assert hooks(model) > 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert hooks(model) == 0
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_a_mixed_batch_sums_the_gradients_of_the_samples(gradient_checkpointing):
    names, inputs = ["x", "y", "x", "x", "y"], batch(5)
    target = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(4))

    def gradients(model):
        return {
            name: p.grad.clone()
            for adapter in "xy"
            for name, p in adapter_parameters(model, adapter).items()
            if p.grad is not None
        }

    model = make_model("x", "y").train()
    for index, name in enumerate(names):
        model.set_adapter(name)
        sample = {key: value[index : index + 1] for key, value in inputs.items()}
        (model(**sample).sample - target[index : index + 1]).square().sum().backward()
    expected = gradients(model)

    model = make_model("x", "y").train()
    if gradient_checkpointing:
        model.base_model.model.enable_gradient_checkpointing()
    model.set_requires_grad(["x", "y"])
    with mixed_batch(model, names):
        loss = (model(**inputs).sample - target).square().sum()
        loss.backward()
    actual = gradients(model)
    assert set(actual) == set(expected) == {n for a in "xy" for n in adapter_parameters(model, a)}
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max().item())
    assert not any(p.grad is not None for n, p in model.named_parameters() if "funlora_" not in n)


# Training


@pytest.mark.parametrize("function", ["cosine", "power", "shift", "identity"])
@pytest.mark.parametrize("operation", ["mul", "mul-add"])
def test_gradient_reaches_every_parameter_of_the_adapter_and_none_of_the_base(function, operation):
    model = make_model(init_weights=True, function=function, operation=operation).train()
    inputs = batch()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = base_weights(model)
    # At the start G of "mul-add" is 0 and the exponents of A B = 1 have no gradient: alpha moves first, then A and B.
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        (model(**inputs).sample - inputs["sample"]).square().mean().backward()
    for name, parameter in model.named_parameters():
        if "funlora_" in name:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    assert_equal(base_weights(model), before)


def test_modules_to_save_are_trained():
    model = make_model(modules_to_save=["conv_out"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    kept = {f"base_model.model.conv_out.modules_to_save.default.{name}" for name in ("weight", "bias")}
    assert trainable == set(adapter_parameters(model)) | kept


def test_all_conv_leaves_copies_of_other_adapters_alone():
    model = make_model("x", modules_to_save=["conv_out"], class_embedding=None)
    model.add_adapter("y", FunLoraConfig(target_modules="all-conv", modules_to_save=["conv_out"]))
    targets = model.peft_config["y"].target_modules
    assert not {"x", "original_module"} & {name.split(".")[-1] for name in targets}
    assert adapted_names(model) == all_convolutions() - {"conv_out"}


def test_the_module_is_a_funlora_model():
    model = make_model()
    assert isinstance(model.base_model, FunLoraModel)
    assert repr(funlora_layers(model)[0]).startswith("funlora.")
