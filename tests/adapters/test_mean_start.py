"""An adapter that starts at the mean of others, against numpy; what names them; what is refused."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from runs import digests, make_tiny_unet, write_adapters
from safetensors.numpy import load_file

from funlora_hf import AdapterBank, BaseMismatchError, FunLoraConfig, save_adapter, start_from
from funlora_hf.adapters.untrusted_adapter import read_config
from funlora_hf.utils.files import read_json


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folders(tiny_pipe, tmp_path):
    """Adapters of the classes 6, 8 and 11, in no order."""
    run = write_adapters(tiny_pipe, tmp_path / "run", classes=(8, 11, 6), base=False)
    return [run / "adapters" / name for name in ("class_8", "class_11", "class_6")]


def new(unet=None, name="default", **config):
    torch.manual_seed(0)
    config = {"class_embedding": "class_embedding", "class_label": 20, **config}
    return get_peft_model(unet or make_tiny_unet(), FunLoraConfig(**config), adapter_name=name)


def values(model, name="default"):
    return {key: tensor.numpy().copy() for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()}


def test_each_number_is_the_mean_of_the_files(folders):
    model = new()
    start_from(model, folders)
    files = [load_file(folder / WEIGHTS) for folder in folders]
    found = values(model)
    assert found.keys() == files[0].keys()
    assert {key.rpartition("funlora_")[2] for key in found} == {"A", "B", "alpha", "omega", "class_vector"}
    for key, number in found.items():
        mean = np.mean([file[key].astype(np.float64) for file in files], axis=0)
        np.testing.assert_array_equal(number, mean.astype(np.float32))
    assert all(p.requires_grad for name, p in model.named_parameters() if "funlora_" in name)


def test_config_and_card_name_them(folders, tmp_path):
    """In any order of the folders, the same bytes."""
    for place, order in (("one", folders), ("other", folders[::-1])):
        model = new()
        start_from(model, order)
        save_adapter(model, tmp_path / place)
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    expected = {folder.name: hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() for folder in folders}
    assert read_config(tmp_path / "one").started_from == expected
    text = ModelCard.load(tmp_path / "one" / "README.md").text
    assert all(f"| {name.replace('_', chr(92) + '_')} | `{digest}` |" in text for name, digest in expected.items())
    save_adapter(new(), tmp_path / "cold")
    assert read_json(tmp_path / "cold" / "adapter_config.json")["started_from"] is None
    assert "## Start" not in ModelCard.load(tmp_path / "cold" / "README.md").text


def test_only_the_named_adapter_starts(folders):
    model = new(name="class_20")
    model.add_adapter("other", FunLoraConfig(class_embedding="class_embedding"))
    before = values(model, "other")
    start_from(model, folders[:1], "class_20")
    np.testing.assert_equal(values(model, "class_20"), load_file(folders[0] / WEIGHTS))
    np.testing.assert_equal(values(model, "other"), before)
    assert model.peft_config["other"].started_from is None


def test_one_class_s_start_is_no_part_of_a_bank(folders, tmp_path):
    model = new()
    start_from(model, folders)
    save_adapter(model, tmp_path / "mine")
    assert AdapterBank(make_tiny_unet(), read_config(tmp_path / "mine")).config.started_from is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"function": "power"}, "class_8' is unlike 'default':\n- `function` is 'cosine', expected 'power'"),
        ({"r": 2}, "`r` is 1, expected 2"),
        ({"target_modules": ["conv_in"]}, "conv_in"),
        ({"class_embedding": None}, "`class_embedding` is 'class_embedding', expected None"),
    ],
)
def test_another_configuration_is_refused(config, message, folders):
    model = new(**config)
    before = values(model)
    with pytest.raises(ValueError, match=message):
        start_from(model, folders)
    np.testing.assert_equal(values(model), before)
    assert model.peft_config["default"].started_from is None


@pytest.mark.parametrize(
    ("choose", "name", "message"),
    [
        (lambda folders: [], "default", r"`adapters` is \[\], expected a list of folders"),
        (lambda folders: str(folders[0]), "default", "`adapters` is '.*class_8', expected a list of folders"),
        (lambda folders: [folders[0], folders[0]], "default", "`adapters` has two of one name among class_8, class_8"),
        (lambda folders: folders, "class_20", r"`adapter_name` is 'class_20', .* of the model: \['default'\]"),
    ],
)
def test_what_is_no_start_is_named(choose, name, message, folders):
    model = new()
    before = values(model)
    with pytest.raises(ValueError, match=message):
        start_from(model, choose(folders), name)
    np.testing.assert_equal(values(model), before)


def test_another_base_and_another_method_are_refused(folders):
    unet = make_tiny_unet()
    unet.conv_in.weight.data += 1
    with pytest.raises(BaseMismatchError, match="class_8' was trained for another base"):
        start_from(new(unet), folders)
    lora = get_peft_model(make_tiny_unet(), LoraConfig(target_modules=["conv_in"]))
    with pytest.raises(ValueError, match="`adapter_name` is 'default', expected a FunLoRA adapter"):
        start_from(lora, folders)


@pytest.mark.parametrize("given", [{}, [], {"class_2": "0"}, {"a\nb": "0" * 64}, {" ": "0" * 64}, {2: "0" * 64}])
def test_a_config_of_no_start_is_refused(given):
    with pytest.raises(ValueError, match=r"`started_from` is .*, expected 64 hexadecimal digits for the name of each"):
        FunLoraConfig(started_from=given)
