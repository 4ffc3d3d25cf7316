from __future__ import annotations

import json

import pytest
import torch
from runs import write_adapters
from safetensors.torch import load_file, save_file

from funlora_hf import AdapterBank, FunLoraConfig
from funlora_hf.adapters.untrusted_adapter import read_adapter
from funlora_hf.adapters.untrusted_bank import METADATA, read_bank


@pytest.fixture
def adapters(tiny_pipe, tmp_path):
    return write_adapters(tiny_pipe, tmp_path, classes=[2, 7], base=False) / "adapters"


@pytest.fixture
def file(adapters, tiny_unet, tmp_path):
    bank = AdapterBank(tiny_unet, FunLoraConfig.from_pretrained(adapters / "class_2"))
    for label in (7, 2):
        bank.add(adapters / f"class_{label}", class_label=label, class_name=f"name {label}")
    bank.save(tmp_path / "bank.safetensors")
    bank.unload()
    return tmp_path / "bank.safetensors"


def change(file, **changes):
    metadata = {**described(file), **changes}
    save_file({key: tensor.clone() for key, tensor in load_file(file).items()}, file, {METADATA: json.dumps(metadata)})


def described(file):
    size = int.from_bytes(file.read_bytes()[:8], "little")
    return json.loads(json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"][METADATA])


def test_what_is_read_is_what_was_saved(file, adapters, tiny_unet):
    bank = read_bank(file)
    assert list(bank.classes.items()) == [(7, "name 7"), (2, "name 2")]
    saved = read_adapter(adapters / "class_7")
    assert {f"base_model.model.{key}": shape.shape for key, shape in bank.shapes.items()} == {
        key: shape.shape for key, shape in saved.shapes.items()
    }
    assert bank.numel == saved.numel
    numbers = torch.cat([saved.tensors()[f"base_model.model.{key}"].flatten() for key in bank.shapes])
    assert torch.equal(bank.rows()[0], numbers)
    bank.check_fits(tiny_unet)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"config": None}, "has no `peft_type`, expected the configuration of an adapter"),
        ({"config": {"peft_type": "LORA"}}, "has adapters of type LORA"),
        (
            {"config": {"peft_type": "FUNLORA", "r": 0}},
            "`r` should be a positive",
        ),
        ({"layout": 3}, r"`layout` has 3, expected \[key, shape\]"),
        ({"layout": [["a", [-1]]]}, r"`layout` has .*, expected \[key, shape\]"),
        ({"classes": [["x", "y"]]}, r"`classes` has .*, expected \[id, name\]"),
    ],
)
def test_a_damaged_description_is_named(file, changes, text):
    change(file, **changes)
    with pytest.raises(ValueError, match=text):
        read_bank(file)


@pytest.mark.parametrize("changes", [{"r": 10**12}, {"num_functions": 9}, {"function": "shift"}])
def test_a_config_that_the_tensors_do_not_show_does_not_fit(file, tiny_unet, changes):
    change(file, config={**described(file)["config"], **changes})
    with pytest.raises(ValueError, match="its tensors are"):
        read_bank(file).check_fits(tiny_unet)


def test_a_class_twice_is_named(file):
    change(file, classes=[[7, "a"], [7, "b"]])
    with pytest.raises(ValueError, match="`classes` has the id 7 twice"):
        read_bank(file)
