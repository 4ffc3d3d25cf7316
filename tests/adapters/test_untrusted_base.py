from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from funlora_hf import FunLoraConfig, FunLoraPipeline, base_fingerprint
from funlora_hf.adapters.untrusted_base import base_classes, load_base, read_unet
from funlora_hf.continual.base import find_base


@pytest.fixture
def folder(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_of_a_pipeline_and_of_a_unet_by_itself(folder, tiny_unet):
    assert base_classes(folder) == {3: "three", 5: "5"}
    assert base_classes(folder / "unet") == {0: "0", 1: "1"}
    for place in (folder, folder / "unet"):
        assert base_fingerprint(read_unet(place)) == base_fingerprint(tiny_unet)
        config = FunLoraConfig(base_model_name_or_path=str(place))
        assert base_fingerprint(load_base(config)) == base_fingerprint(tiny_unet)


@pytest.mark.parametrize(
    ("name", "content"), [("model_index.json", "{"), ("model_index.json", "[1]"), ("unet/config.json", "{")]
)
def test_classes_that_cannot_be_read(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises((ValueError, OSError)):
        base_classes(folder)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "cut", "pickle", "gone"])
def test_a_unet_that_is_not_all_there(folder, damage):
    (weights,) = (folder / "unet").glob("*.safetensors")
    tensors = {key: tensor.clone() for key, tensor in load_file(weights).items()}
    if damage == "missing":
        del tensors["conv_in.weight"]
    if damage == "unexpected":
        tensors["other"] = torch.zeros(1)
    if damage in ("missing", "unexpected"):
        save_file(tensors, weights, {"format": "pt"})
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-4])
    if damage in ("pickle", "gone"):
        weights.unlink()
    if damage == "pickle":
        torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"'.*base.*'"):
        read_unet(folder)


@pytest.mark.parametrize("kind", ["lora", "funlora"])
def test_a_base_saved_with_adapters_inside_is_refused_by_every_reader(kind, folder, tiny_unet, tmp_path):
    """diffusers itself loads it with random weights in place of the wrapped ones, and warns."""
    config = FunLoraConfig() if kind == "funlora" else LoraConfig(target_modules=["conv1"])
    inject_adapter_in_model(config, tiny_unet).save_pretrained(folder / "unet")
    readers = [
        lambda: read_unet(folder),
        lambda: load_base(FunLoraConfig(base_model_name_or_path=str(folder))),
        lambda: load_base(FunLoraConfig(base_model_name_or_path=str(folder / "unet"))),
        lambda: FunLoraPipeline.from_pretrained(folder),
        lambda: find_base(str(folder)),
        lambda: base_classes(folder),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=r"\.base_layer\..*saved with adapters inside"):
            read()
