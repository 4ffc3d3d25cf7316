from __future__ import annotations

import json

from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from runs import digests

from funlora_hf import FunLoraConfig
from funlora_hf.adapters.class_folder import adapter_folders, save_adapter


def test_a_folder_has_config_weights_and_card(tiny_unet, tmp_path):
    config = FunLoraConfig(class_embedding="class_embedding", class_label=7, class_name="seven")
    model = get_peft_model(tiny_unet, config, adapter_name="class_7")
    for place in ("a", "b"):
        save_adapter(model, "class_7", tmp_path / place / "class_7")
    folder = tmp_path / "a" / "class_7"
    assert sorted(digests(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert json.loads((folder / "adapter_config.json").read_text())["class_label"] == 7
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"| parameters, class vector included | {numbers:,} |" in card.text
    assert "# seven" in card.text


def test_the_default_adapter_is_written_in_place(tiny_unet, tmp_path):
    model = get_peft_model(tiny_unet, FunLoraConfig())
    save_adapter(model, "default", tmp_path / "a")
    assert sorted(digests(tmp_path / "a")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_folders_come_by_rising_id(tmp_path):
    for name in ("class_10", "class_9", "class_x", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in adapter_folders(tmp_path)] == ["class_9", "class_10"]


def test_names_of_modules_are_written_in_one_order(tiny_unet, tmp_path):
    """PEFT writes those of its LoRA in the order of a set, which differs from process to process."""
    names = ["to_q", "to_v", "to_k", "to_out.0", "conv1", "conv2"]
    model = get_peft_model(tiny_unet, LoraConfig(target_modules=names), adapter_name="class_7")
    save_adapter(model, "class_7", tmp_path / "class_7")
    text = (tmp_path / "class_7" / "adapter_config.json").read_text()
    assert json.loads(text)["target_modules"] == sorted(names)
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
