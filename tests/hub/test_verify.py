"""Verification: what is damaged is named, what is sound is not, and one bad file hides no other."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import digests
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from funlora_hf import AdapterBank, FunLoraConfig, FunLoraPipeline, base_fingerprint, push_all
from funlora_hf.continual.base import find_base
from funlora_hf.hub.verify import verify
from funlora_hf.utils.files import read_json, write_json


@pytest.fixture
def bank_file(run_folder):
    pipe = FunLoraPipeline.from_pretrained(run_folder / "base")
    bank = AdapterBank(pipe.unet, FunLoraConfig.from_pretrained(run_folder / "adapters" / "class_7"))
    for label in (7, 8):
        bank.add(run_folder / "adapters" / f"class_{label}")
    bank.save(run_folder / "digits.safetensors")
    return run_folder / "digits.safetensors"


def rewrite(file, change):
    """Apply `change` to the tensors of a file and keep its metadata."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def first(tensors):
    return tensors[min(tensors)].view(-1)


def put_nan(tensors):
    first(tensors)[0] = torch.nan


def as_integers(tensors):
    tensors[min(tensors)] = tensors[min(tensors)].to(torch.int32)


def longer(tensors):
    key = next(key for key in sorted(tensors) if key.endswith("funlora_A"))
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def outcomes(verdicts):
    return {verdict.name: verdict.ok for verdict in verdicts}


def test_a_sound_run_with_a_bank_is_left_as_it_was(run_folder, bank_file, tiny_pipe):
    before = digests(run_folder)
    verdicts = verify(run_folder)
    assert [(verdict.kind, verdict.name, verdict.ok) for verdict in verdicts] == [
        ("base", "base", True),
        ("adapter", "adapters/class_7", True),
        ("adapter", "adapters/class_8", True),
        ("bank", "digits.safetensors", True),
    ]
    assert base_fingerprint(tiny_pipe.unet) in verdicts[0].detail
    assert {verdict.detail for verdict in verdicts[1:3]} == {"made for this base"}
    assert digests(run_folder) == before


@pytest.mark.parametrize(
    ("file", "damage", "text"),
    [
        ("adapter_config.json", lambda file: file.write_text("{"), "is not a valid JSON file"),
        ("adapter_config.json", lambda file: write_json(file, {**read_json(file), "r": 3}), "`r` is 3"),
        ("adapter_config.json", lambda file: write_json(file, {**read_json(file), "class_label": 9}), "says class 9"),
        ("adapter_config.json", lambda file: file.unlink(), "has no adapter_config.json"),
        (
            "adapter_model.safetensors",
            lambda file: file.write_bytes(file.read_bytes()[:-4]),
            "not a valid safetensors",
        ),
        ("adapter_model.safetensors", lambda file: file.unlink(), "has no adapter_model.safetensors"),
        ("adapter_model.safetensors", lambda file: rewrite(file, put_nan), "found NaN or infinity"),
        ("adapter_model.safetensors", lambda file: rewrite(file, as_integers), "tensors of type I32"),
        ("adapter_model.safetensors", lambda file: rewrite(file, longer), "its tensors are not those of its config"),
    ],
)
def test_damage_is_named_and_hides_no_other_adapter(run_folder, file, damage, text):
    damage(run_folder / "adapters" / "class_7" / file)
    verdicts = {verdict.name: verdict for verdict in verify(run_folder)}
    assert outcomes(verdicts.values()) == {"base": True, "adapters/class_7": False, "adapters/class_8": True}
    assert text in verdicts["adapters/class_7"].detail
    assert "\n" not in str(verdicts["adapters/class_7"])


def test_a_damaged_base_fails_and_adapters_are_still_looked_at(run_folder):
    config = run_folder / "adapters" / "class_8" / "adapter_config.json"
    config.write_text("{")
    (weights,) = (run_folder / "base" / "unet").glob("*.safetensors")
    rewrite(weights, put_nan)
    base, seven, eight = verify(run_folder)
    assert (base.ok, seven.ok, eight.ok) == (False, True, False)
    assert "NaN or infinity" in base.detail
    assert seven.detail == "base not checked"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda tensors: tensors.pop("conv_in.weight"), "conv_in.weight"),
        (lambda tensors: tensors.update(other=torch.zeros(1)), "unexpected_keys: other"),
        (lambda tensors: tensors.update({"conv_in.weight": torch.zeros(2, 2)}), "conv_in.weight"),
    ],
)
def test_a_base_without_its_tensors_fails(run_folder, damage, text):
    """diffusers loads the first two with a warning, the first with random numbers."""
    (weights,) = (run_folder / "base" / "unet").glob("*.safetensors")
    rewrite(weights, damage)
    base = verify(run_folder)[0]
    assert not base.ok
    assert text in base.detail


def test_a_base_of_other_numbers_fails_all_its_adapters(run_folder):
    (weights,) = (run_folder / "base" / "unet").glob("*.safetensors")
    rewrite(weights, lambda tensors: first(tensors).add_(1e-3))
    base, *adapters = verify(run_folder)
    assert base.ok
    assert all(not verdict.ok and "trained for another base" in verdict.detail for verdict in adapters)


@pytest.mark.parametrize(
    ("file", "changes", "text"),
    [
        ("scheduler/scheduler_config.json", {"shift": 3.0}, "`base.scheduler.shift` is 3.0"),
        ("unet/config.json", {"class_embed_type": "identity"}, "`base.unet.class_embed_type` is 'identity'"),
        ("model_index.json", {"class_ids": [3], "id2label": None}, "`class_ids` has 1 different ids, expected 2"),
        ("model_index.json", {"id2label": {"4": "cat"}}, "`id2label` names [4], expected"),
        ("model_index.json", {"id2label": {"3": "cat", "5": "cat"}}, "'cat' is used for two classes"),
    ],
)
def test_a_base_that_no_pipeline_takes_fails_and_is_not_trained_on(run_folder, file, changes, text):
    place = run_folder / "base" / file
    write_json(place, {**read_json(place), **changes})
    with pytest.raises(ValueError, match=next(iter(changes)) if "cat" not in text else "class_name"):
        FunLoraPipeline.from_pretrained(run_folder / "base")
    base = verify(run_folder)[0]
    assert not base.ok
    assert text in base.detail
    with pytest.raises(ValueError, match=re.escape(text.replace("`base.", "`base_model."))):
        find_base(str(run_folder))


def test_a_base_of_other_settings_fails_all_its_adapters(run_folder):
    config = run_folder / "base" / "unet" / "config.json"
    write_json(config, {**read_json(config), "act_fn": "relu"})
    base, *adapters = verify(run_folder)
    assert base.ok
    assert all(not verdict.ok and "of its config" in verdict.detail for verdict in adapters)


def test_adapters_alone_are_held_against_the_base_given(run_folder, tiny_pipe, tmp_path):
    alone = run_folder / "adapters"
    assert [verdict.detail for verdict in verify(alone)] == ["base not checked"] * 2
    assert [verdict.detail for verdict in verify(alone, base=run_folder)] == ["made for this base"] * 2
    assert [verdict.detail for verdict in verify(alone / "class_7", base=run_folder / "base" / "unet")] == [
        "made for this base"
    ]
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0] += 1e-3
    tiny_pipe.save_pretrained(tmp_path / "other")
    assert not any(verdict.ok for verdict in verify(alone, base=tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="which has no base"):
        verify(alone, base=alone)


def test_other_methods_of_peft_fit_by_their_shapes(run_folder, tiny_pipe):
    model = get_peft_model(copy.deepcopy(tiny_pipe.unet), LoraConfig(target_modules=["conv1"], r=2))
    model.save_pretrained(run_folder / "adapters" / "class_9", save_embedding_layers=False)
    verdict = verify(run_folder)[-1]
    assert (verdict.name, verdict.ok) == ("adapters/class_9", True)
    assert "no fingerprint" in verdict.detail
    (run_folder / "adapters" / "class_9" / "README.md").write_text(
        "---\n: [\n---\n"
    )  # which has the name of its class
    assert not verify(run_folder)[-1].ok


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda file: rewrite(file, lambda tensors: tensors["adapters"][1].fill_(torch.inf)), "in class 8."),
        (lambda file: rewrite(file, lambda tensors: tensors.update(adapters=tensors["adapters"][:1])), "every class"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), "not a valid safetensors file"),
        (lambda file: save_file({"adapters": torch.zeros(2, 3)}, file), "not written by AdapterBank.save"),
    ],
)
def test_a_damaged_bank_is_named(bank_file, damage, text):
    damage(bank_file)
    (verdict,) = verify(bank_file)
    assert (verdict.kind, verdict.name, verdict.ok) == ("bank", "digits.safetensors", False)
    assert text in verdict.detail


def test_a_bank_is_held_against_the_base(run_folder, bank_file):
    assert [verdict.detail for verdict in verify(bank_file)] == ["2 classes, base not checked"]
    assert [verdict.detail for verdict in verify(bank_file, base=run_folder)] == ["2 classes, made for this base"]
    (weights,) = (run_folder / "base" / "unet").glob("*.safetensors")
    rewrite(weights, lambda tensors: first(tensors).add_(1e-3))
    assert "trained for another base" in verify(bank_file, base=run_folder)[0].detail


def test_a_repository_and_a_damaged_download(hub, run_folder):
    push_all(run_folder, "user/digits")
    assert all(verdict.ok for verdict in verify("user/digits"))
    shutil.rmtree(run_folder / "adapters" / "class_7")
    config = run_folder / "adapters" / "class_8" / "adapter_config.json"
    hub.commit(
        "user/other", {f"class_8/{path.name}": path.read_bytes() + b" " for path in config.parent.glob("*.json")}
    )
    hub.commit(
        "user/other", {f"class_8/{path.name}": path.read_bytes() for path in config.parent.glob("*.safetensors")}
    )
    hub.corrupt("adapter_config.json", lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], times=1)
    (verdict,) = verify("user/other")
    assert not verdict.ok
    assert "damaged on its way from the Hub" in verdict.detail
    Path(re.search("Delete '(.+)' and load it again", verdict.detail)[1]).unlink()
    assert [verdict.ok for verdict in verify("user/other")] == [True]


def test_a_repository_whose_base_is_not_the_one_of_its_index(hub, run_folder):
    push_all(run_folder, "user/digits")
    (weights,) = (run_folder / "base" / "unet").glob("*.safetensors")
    rewrite(weights, lambda tensors: first(tensors).add_(1e-3))
    hub.commit("user/digits", {f"unet/{weights.name}": weights.read_bytes()})
    base = verify("user/digits")[0]
    assert not base.ok
    assert "classes.json says" in base.detail


def test_nothing_to_check_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither a base nor an adapter nor a bank"):
        verify(tmp_path)
