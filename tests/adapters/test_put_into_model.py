"""Adapters in models of diffusers: what `load_adapter` returns, what it reads, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from runs import make_tiny_unet
from safetensors.torch import load_file, save_file
from text_to_image import make_model, make_pipeline

from funlora_hf import AdapterBank, BaseMismatchError, FunLoraConfig, base_fingerprints, load_adapter, save_adapter
from funlora_hf.adapters.put_into_model import with_adapter_methods
from funlora_hf.tuner import FunLoraLayer


WEIGHTS = "pytorch_lora_weights.safetensors"


def config(**fields):
    return FunLoraConfig(**{"target_modules": ["to_q", "to_v"], "init_weights": False, **fields})


def tensors_of(model, adapter_name):
    return get_peft_model_state_dict(model, adapter_name=adapter_name)


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter of the tiny UNet2DConditionModel."""
    model = make_model("UNet2DConditionModel")
    model.add_adapter(config())
    save_adapter(model, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "name", ["DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DModel"]
)
def test_a_model_with_diffusers_mixin_is_returned_itself(name, tmp_path):
    def base():
        return make_tiny_unet() if name == "UNet2DModel" else make_model(name)

    fields = {"target_modules": ["conv1"]} if name == "UNet2DModel" else {}
    model = inject_adapter_in_model(config(**fields), base())
    save_adapter(model, tmp_path / "a")
    other = base()
    loaded = load_adapter(other, tmp_path / "a")
    assert isinstance(loaded, PeftModel) == (name != "SD3Transformer2DModel")
    assert (loaded is other) == (name == "SD3Transformer2DModel")
    assert not loaded.training
    expected = tensors_of(model, "default")
    found = {key.removeprefix("base_model.model."): t for key, t in tensors_of(loaded, "default").items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    # Whatever holds the adapter, the files are the same.
    save_adapter(loaded, tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_methods_of_the_mixin_are_given_once(tmp_path):
    pixart, others = (
        make_model("PixArtTransformer2DModel"),
        [make_model("SD3Transformer2DModel"), torch.nn.Linear(1, 1)],
    )
    own = type(pixart)
    assert with_adapter_methods(pixart) is pixart
    given = type(pixart)
    assert type(with_adapter_methods(pixart)) is given
    for other in (*others, get_peft_model(make_model("PixArtTransformer2DModel"), config())):
        kind = type(other)
        assert type(with_adapter_methods(other)) is kind
    pixart.save_pretrained(tmp_path)
    again = own.from_pretrained(tmp_path)
    assert type(again) is own
    assert {key: value for key, value in again.config.items() if key[0] != "_"} == {
        key: value for key, value in pixart.config.items() if key[0] != "_"
    }
    names = [type(layer).__name__ for layer in pixart.modules()]
    pixart.add_adapter(config(), "mine")
    pixart.disable_adapters()
    assert pixart.active_adapters() == ["mine"]
    pixart.delete_adapters("mine")
    pixart.unload_lora()
    assert [type(layer).__name__ for layer in copy.deepcopy(pixart).modules()] == names


def test_saved_settings_name_the_class_of_the_base(saved):
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings["auto_mapping"]["base_model_class"] == "UNet2DConditionModel"
    assert settings["base_fingerprint"] == base_fingerprints(make_model("UNet2DConditionModel"))
    assert settings["inference_mode"]


def test_modules_saved_whole_are_loaded(tmp_path):
    model = make_model("UNet2DConditionModel")
    model.add_adapter(config(modules_to_save=["conv_out"]))
    with torch.no_grad():
        model.conv_out.modules_to_save["default"].weight.add_(1.0)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(make_model("UNet2DConditionModel"), tmp_path / "a", adapter_name="mine")
    expected = model.conv_out.modules_to_save["default"].weight
    assert torch.equal(loaded.conv_out.modules_to_save["mine"].weight, expected)


@pytest.mark.parametrize("before", [None, "lora", "funlora"])
def test_a_refused_adapter_leaves_the_model_as_it_was(saved, before):
    model = make_model("UNet2DConditionModel")
    if before is not None:
        model.add_adapter(LoraConfig(target_modules=["to_k"]) if before == "lora" else config(), "before")
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, next(iter(tensors)): torch.zeros(3)}, file)
    keys, training = set(model.state_dict()), model.training
    with pytest.raises(ValueError, match="does not fit this base"):
        load_adapter(model, saved)
    assert set(model.state_dict()) == keys
    assert model.training == training
    assert list(getattr(model, "peft_config", {})) == ([] if before is None else ["before"])
    save_file(tensors, file)
    assert list(load_adapter(model, saved).peft_config) == [*([] if before is None else ["before"]), "default"]
    with pytest.raises(ValueError, match="`adapter_name` is 'default', which the model has already"):
        load_adapter(model, saved)


def test_a_model_without_adapters_is_not_saved(tmp_path):
    with pytest.raises(
        ValueError, match="`model` is a UNet2DConditionModel, expected a PeftModel, or a model with adapt"
    ):
        save_adapter(make_model("UNet2DConditionModel"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_config_belongs_to_files_that_have_none(saved, tmp_path):
    def load(folder, **arguments):
        return load_adapter(make_model("UNet2DConditionModel"), folder, ignore_base_fingerprint=True, **arguments)

    with pytest.raises(ValueError, match=r"`config` is given, but .*saved"):
        load(saved, config=config())
    plain = {
        key.removeprefix("base_model.model."): t for key, t in load_file(saved / "adapter_model.safetensors").items()
    }
    settings = {**config().to_dict(), "target_modules": ["to_q", "to_v"]}
    for folder, tensors, metadata in (
        ("component", plain, settings),
        (
            "pipeline",
            {f"unet.{key}": t for key, t in plain.items()},
            {f"unet.{key}": v for key, v in settings.items()},
        ),
        ("bare", {f"unet.{key}": t for key, t in plain.items()}, None),
    ):
        (tmp_path / folder).mkdir()
        header = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
        save_file(tensors, tmp_path / folder / WEIGHTS, metadata=header)
        if metadata is None:
            with pytest.raises(ValueError, match="has no configuration of the adapter in it: pass `config`"):
                load(tmp_path / folder)
            model = load(tmp_path / folder, config=config())
        else:
            with pytest.raises(ValueError, match=r"`config` is given, but .* has its own"):
                load(tmp_path / folder, config=config())
            model = load(tmp_path / folder)
        found = tensors_of(model, "default")
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())
        layers = [module for module in model.modules() if isinstance(module, FunLoraLayer)]
        assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def test_a_part_of_a_pipeline_is_read_by_its_prefix(tmp_path):
    pipe, other = make_pipeline("SD"), make_pipeline("SD")
    fields = {"text_encoder": config(target_modules=["q_proj"]), "unet": config()}
    for part in fields:
        getattr(pipe, part).add_adapter(fields[part])
    layers = {part: tensors_of(getattr(pipe, part), "default") for part in fields}
    pipe.save_lora_weights(tmp_path, layers["unet"], text_encoder_lora_layers=layers["text_encoder"])
    with pytest.warns(
        UserWarning, match="also has tensors of text_encoder, left out. Load that of pipe.text_encoder by"
    ):
        load_adapter(other.unet, tmp_path, config=fields["unet"])
    with pytest.raises(ValueError, match=r"`prefix` is 'text_encoder_2', expected .* has: unet, text_encoder\."):
        load_adapter(other.text_encoder, tmp_path, config=fields["text_encoder"], prefix="text_encoder_2")
    with pytest.warns(UserWarning, match="also has tensors of unet, left out"):
        load_adapter(other.text_encoder, tmp_path, config=fields["text_encoder"], prefix="text_encoder")
    for part, expected in layers.items():
        found = tensors_of(getattr(other, part), "default")
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    # Alone, it needs no prefix.
    pipe.save_lora_weights(tmp_path, text_encoder_lora_layers=layers["text_encoder"])
    load_adapter(make_pipeline("SD").text_encoder, tmp_path, config=fields["text_encoder"])


def test_a_file_of_another_name(saved, tmp_path):
    model, other = make_model("UNet2DConditionModel"), make_model("UNet2DConditionModel")
    model.add_adapter(config())
    model.save_lora_adapter(tmp_path, weight_name="mine.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"If diffusers wrote it, pass `weight_name`, such as 'mine\.safetensors'"
    ):
        load_adapter(other, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no yours\.safetensors, which `weight_name` names"):
        load_adapter(other, tmp_path, weight_name="yours.safetensors")
    load_adapter(other, tmp_path, weight_name="mine.safetensors")
    expected = tensors_of(model, "default")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors_of(other, "default").items())
    with pytest.raises(ValueError, match=r"`prefix` is given, but .*saved' has one adapter: leave it out"):
        load_adapter(make_model("UNet2DConditionModel"), saved, prefix="unet")


@pytest.mark.parametrize("metadata", ["{", "[]", '"a"', "{}", '{"peft_type": "FUNLORA", "r": -1}', '{"peft_type": 7}'])
def test_damaged_metadata_is_refused(saved, tmp_path, metadata):
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file(tensors, tmp_path / WEIGHTS, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=WEIGHTS):
        load_adapter(make_model("UNet2DConditionModel"), tmp_path)


def test_a_lora_is_read_in_diffusers_form(tmp_path):
    model = make_model("UNet2DConditionModel")
    model.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    model.save_lora_adapter(tmp_path)
    loaded = load_adapter(make_model("UNet2DConditionModel"), tmp_path)
    expected = tensors_of(model, "default")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors_of(loaded, "default").items())


def test_a_peft_model_gets_one_more(saved):
    model = get_peft_model(make_model("UNet2DConditionModel"), config(), adapter_name="first")
    loaded = load_adapter(model, saved, adapter_name="second")
    assert loaded is model
    assert model.active_adapters == ["first"]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("UNet2DConditionModel", ["conv1", "to_qkv"]),
        ("FluxTransformer2DModel", ["to_qkv"]),
        ("DiTTransformer2DModel", ["to_q"]),
    ],
)
def test_a_bank_of_any_diffusers_model(name, targets, tmp_path):
    def base():
        model = make_model(name)
        if "to_qkv" in targets:
            model.fuse_qkv_projections()
        return model

    model, expected = base(), {}
    for label in (1, 2):
        inject_adapter_in_model(config(target_modules=targets), model, f"class_{label}")
        save_adapter(model, tmp_path / f"class_{label}", f"class_{label}", class_label=label)
        expected[label] = tensors_of(model, f"class_{label}")
    bank = AdapterBank.from_hub(tmp_path, base())
    assert list(bank.classes) == [1, 2]
    for label in (2, 1):
        bank.activate(label)
        assert all(torch.equal(tensor, expected[label][key]) for key, tensor in bank.live_tensors.items())
    other = make_model(name)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(BaseMismatchError):
        AdapterBank.from_hub(tmp_path, other)
