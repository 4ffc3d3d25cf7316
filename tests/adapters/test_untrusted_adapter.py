from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import write_adapters

from funlora_hf import AdapterBank, FunLoraConfig, FunLoraPipeline, load_adapter
from funlora_hf.adapters.base_fingerprint import BaseMismatchError, base_fingerprints
from funlora_hf.adapters.untrusted_adapter import MOST_CONFIG_BYTES, fetch, read_adapter


@pytest.fixture
def folder(tiny_pipe, tmp_path):
    """An adapter of class 7, written for the base of `tiny_pipe`, with its fingerprint."""
    fingerprint = base_fingerprints(tiny_pipe.unet)
    write_adapters(
        tiny_pipe, tmp_path, classes=[7], base=False, class_label=7, class_name="seven", base_fingerprint=fingerprint
    )
    return tmp_path / "adapters" / "class_7"


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def velocities(pipe, class_id=3):
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.predict_velocity(sample, torch.tensor(0.5), [class_id] * 2)


def test_what_is_read_is_what_was_saved(folder, tiny_pipe):
    adapter = read_adapter(folder)
    assert (adapter.config.class_label, adapter.config.class_name) == (7, "seven")
    tensors = adapter.tensors()
    assert {key: tensor.shape for key, tensor in tensors.items()} == {k: t.shape for k, t in adapter.shapes.items()}
    assert adapter.numel == sum(tensor.numel() for tensor in tensors.values())
    adapter.check_fits(tiny_pipe.unet)


def test_another_base_is_refused_by_name_only(folder, tiny_pipe):
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0] += 1e-3
    before = velocities(tiny_pipe)
    with pytest.raises(BaseMismatchError, match="fingerprint"):
        tiny_pipe.load_adapter(folder)
    assert tiny_pipe.classes == {3: "three", 5: "5"}
    assert torch.equal(velocities(tiny_pipe), before)
    assert tiny_pipe.load_adapter(folder, ignore_base_fingerprint=True) == 7


def saved_from_a_pipeline(pipe, folder, place):
    pipe.load_adapter(folder, ignore_base_fingerprint=True)
    pipe.save_pretrained(place)
    FunLoraPipeline.from_pretrained(place)
    return place / "adapters" / "class_7"


def saved_from_a_bank(pipe, folder, place):
    bank = AdapterBank(pipe.unet, FunLoraConfig.from_pretrained(folder))
    bank.add(folder, ignore_base_fingerprint=True)
    bank.save(place / "bank.safetensors")
    bank.unload()
    again = AdapterBank.load(place / "bank.safetensors", pipe.unet)
    again.unload()
    return place / "bank.safetensors"


def saved_from_a_bank_of_folders(pipe, folder, place):
    bank = AdapterBank.from_hub(folder.parent, pipe.unet, ignore_base_fingerprint=True)
    bank.save(place / "bank.safetensors")
    bank.unload()
    AdapterBank.load(place / "bank.safetensors", pipe.unet).unload()
    return place / "bank.safetensors"


def saved_from_a_peft_model(pipe, folder, place):
    model = load_adapter(pipe.unet, folder, ignore_base_fingerprint=True)
    model.save_pretrained(place, save_embedding_layers=False)
    model.unload()
    return place / "class_7"


@pytest.mark.parametrize(
    "save",
    [saved_from_a_pipeline, saved_from_a_bank, saved_from_a_bank_of_folders, saved_from_a_peft_model],
)
def test_what_was_loaded_onto_another_base_loads_where_it_was_saved(save, folder, tiny_pipe, tmp_path):
    """And not onto the base that it was trained for."""
    trained_for = copy.deepcopy(tiny_pipe.unet)
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0] += 1e-3
    saved = save(tiny_pipe, folder, tmp_path)
    pipe = FunLoraPipeline(trained_for, tiny_pipe.scheduler, [3, 5])
    with pytest.raises(BaseMismatchError):
        (pipe.load_adapter_bank if saved.suffix else pipe.load_adapter)(saved)
    pipe = FunLoraPipeline(tiny_pipe.unet, tiny_pipe.scheduler, [3, 5])
    if save is not saved_from_a_pipeline:
        (pipe.load_adapter_bank if saved.suffix else pipe.load_adapter)(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_low_precision_is_the_same_base(folder, tiny_pipe, dtype):
    tiny_pipe.to(dtype)
    assert tiny_pipe.load_adapter(folder) == 7


def test_a_regex_of_a_file_is_not_run(folder, tiny_pipe, tmp_path):
    """This one takes time exponential in the length of a name that it does not match."""
    plain = copy.deepcopy(tiny_pipe.unet)
    change_config(folder, target_modules=r"(([a-z0-9_]+\.?)+)+!", exclude_modules=r"(([a-z0-9_]+\.?)+)+!")
    tiny_pipe.load_adapter(folder)
    expected = FunLoraPipeline(plain, tiny_pipe.scheduler, [3, 5], {3: "three"})
    change_config(folder, target_modules=None, exclude_modules=None)
    expected.load_adapter(folder)
    assert torch.equal(velocities(tiny_pipe, 7), velocities(expected, 7))


@pytest.mark.parametrize("sizes", [{"r": 10**12}, {"num_functions": 10**12}, {"r": 2}, {"num_functions": 9}])
def test_sizes_that_the_tensors_do_not_show_are_refused(folder, tiny_pipe, sizes):
    change_config(folder, **sizes)
    ((field, value),) = sizes.items()
    with pytest.raises(ValueError, match=f"`{field}` is {value}, but its tensors are made for "):
        tiny_pipe.load_adapter(folder)


@pytest.mark.parametrize("ratio", [2, 10**12])
def test_a_ratio_that_the_tensors_do_not_show_is_refused(folder, tiny_pipe, ratio):
    change_config(folder, ratio=ratio)
    with pytest.raises(ValueError, match="its tensors are not those of its config on this model"):
        tiny_pipe.load_adapter(folder)


def test_an_adapter_bigger_than_its_base_is_refused(tiny_pipe, tmp_path):
    model = get_peft_model(copy.deepcopy(tiny_pipe.unet), LoraConfig(target_modules=["conv1"], r=2000))
    model.save_pretrained(tmp_path / "big", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"does not fit this base: it holds \d+ numbers, expected \d+ at most"):
        tiny_pipe.load_adapter(tmp_path / "big", class_label=9)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa', which would change the base"),
        ({"init_lora_weights": "eva"}, "`init_lora_weights` is 'eva'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "`megatron_config` is set, which would import"),
    ],
)
def test_lora_that_would_change_the_base_or_import_is_refused(tiny_pipe, tmp_path, changes, text):
    model = get_peft_model(copy.deepcopy(tiny_pipe.unet), LoraConfig(target_modules=["conv1"]))
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    change_config(tmp_path / "lora", **changes)
    with pytest.raises(ValueError, match=text):
        tiny_pipe.load_adapter(tmp_path / "lora", class_label=9)


def test_a_pickle_is_never_read(folder, tiny_pipe):
    torch.save({"a": torch.zeros(1)}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"class_7' has no adapter_model\.safetensors"):
        tiny_pipe.load_adapter(folder)


def test_a_config_of_megabytes_is_refused(folder):
    with open(folder / "adapter_config.json", "a") as file:
        file.write(" " * MOST_CONFIG_BYTES)
    with pytest.raises(ValueError, match=f"expected {MOST_CONFIG_BYTES} at most"):
        read_adapter(folder)


def test_from_the_hub_and_from_the_cache(folder, hub, tiny_pipe):
    contents = {f"class_7/{path.name}": path.read_bytes() for path in folder.iterdir()}
    first = hub.commit("user/digits", {**contents, "big.bin": b"x" * 100})
    hub.commit("user/digits", {"class_7/adapter_config.json": b"{}"})
    adapter = read_adapter("user/digits", subfolder="class_7", revision=first)
    local = read_adapter(folder)
    assert adapter.config == local.config
    assert all(torch.equal(tensor, local.tensors()[key]) for key, tensor in adapter.tensors().items())
    assert not any("big.bin" in path or "README" in path for _, path in hub.requests)
    asked = len(hub.requests)
    cached = read_adapter("user/digits", subfolder="class_7", revision=first, local_files_only=True)
    assert cached.config == local.config
    assert len(hub.requests) == asked
    assert tiny_pipe.load_adapter("user/digits", subfolder="class_7", revision=first) == 7


def test_what_is_not_there_is_said(folder, hub, tmp_path):
    hub.commit("user/digits", {"a": b"b"})
    with pytest.raises(FileNotFoundError, match=r"'user/digits', subfolder 'class_7', has no adapter_config\.json"):
        read_adapter("user/digits", subfolder="class_7")
    with pytest.raises(FileNotFoundError, match="`revision` is 'v2', which repository 'user/digits' does not have"):
        read_adapter("user/digits", revision="v2")
    with pytest.raises(FileNotFoundError, match="'user/other' is neither a folder that is there nor a repository"):
        read_adapter("user/other")
    with pytest.raises(FileNotFoundError, match=r"'user/unseen' is neither a folder .* in the cache: correct"):
        read_adapter("user/unseen", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="is neither a folder that is there nor the name of a repository"):
        read_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("subfolder", ["../class_7", "a/../../b", "/etc"])
def test_no_name_leads_out_of_a_repository(hub, subfolder):
    hub.commit("user/digits", {"a": b"b"})
    with pytest.raises(ValueError, match="expected a place inside the repository"):
        read_adapter("user/digits", subfolder=subfolder)
    assert not hub.requests


def test_names_in_a_listing_lead_nowhere(folder, hub):
    """A repository may claim to hold anything: only the names asked for are fetched."""
    contents = {f"class_7/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.commit("user/digits", {**contents, "../../evil": b"x", "class_*/../../evil": b"x", "class_7/../evil": b"x"})
    root = fetch("user/digits", ["class_*/adapter_config.json", "class_*/adapter_model.safetensors"])
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    assert found == ["class_7/adapter_config.json", "class_7/adapter_model.safetensors"]


def test_a_truncated_or_changed_download_is_refused(folder, hub, tiny_pipe):
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    before = velocities(tiny_pipe)
    hub.commit("user/digits", contents)
    hub.corrupt("adapter_model.safetensors", lambda content: content[:-4])
    with pytest.raises((OSError, ValueError)):
        tiny_pipe.load_adapter("user/digits")
    hub.clear_faults()
    hub.corrupt("adapter_model.safetensors", lambda content: bytes(8) + content[8:])
    with pytest.raises(ValueError, match="was damaged on its way from the Hub"):
        tiny_pipe.load_adapter("user/digits")
    assert tiny_pipe.classes == {3: "three", 5: "5"}
    assert torch.equal(velocities(tiny_pipe), before)


@pytest.mark.parametrize("times", [1, 10**6])
def test_a_download_that_is_cut_goes_on_or_changes_nothing(folder, hub, waits, tiny_pipe, times):
    hub.commit("user/digits", {path.name: path.read_bytes() for path in folder.iterdir()})
    hub.cut(method="GET", path=r"adapter_model\.safetensors", after_bytes=500, times=times)
    before = velocities(tiny_pipe)
    if times == 1:
        assert tiny_pipe.load_adapter("user/digits") == 7
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011 - of the HTTP library that the client uses
            tiny_pipe.load_adapter("user/digits")
        assert tiny_pipe.classes == {3: "three", 5: "5"}
        assert torch.equal(velocities(tiny_pipe), before)
        hub.clear_faults()
        assert tiny_pipe.load_adapter("user/digits") == 7


def delete_what_it_names(caught) -> None:
    """Do what the error of a damaged download asks for."""
    Path(re.search("Delete '(.+)' and load it again", str(caught.value))[1]).unlink()


def test_a_flipped_bit_of_a_download_is_noticed(folder, hub, tiny_pipe):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        hub.commit("user/digits", {path.name: path.read_bytes() + b" " * len(name) for path in folder.glob("*.json")})
        hub.commit("user/digits", {path.name: path.read_bytes() for path in folder.glob("*.safetensors")})
        hub.corrupt(name, lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], times=1)
        with pytest.raises(ValueError, match=f"{name} was damaged on its way from the Hub") as caught:
            tiny_pipe.load_adapter("user/digits")
        delete_what_it_names(caught)
    assert tiny_pipe.load_adapter("user/digits") == 7


@pytest.mark.parametrize("place", ["blobs", "a/blobs", ".ollama/models/blobs"])
def test_a_link_out_of_a_folder_deletes_nothing(place, folder, tmp_path, monkeypatch):
    """Neither beside the Hub's cache nor in it: what is damaged there is named, and deleted by who reads the error."""
    blob = tmp_path / place / "sha256-0123"
    blob.parent.mkdir(parents=True)
    config = folder / "adapter_config.json"
    config.rename(blob)
    config.symlink_to(blob)
    assert read_adapter(folder).config.peft_type == "FUNLORA"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"adapter_config\.json was damaged"):
        read_adapter(folder)
    assert blob.is_file()


def test_a_config_with_unknown_keys_loads_with_a_warning(folder):
    change_config(folder, of_a_later_version=1)
    with pytest.warns(UserWarning, match="of_a_later_version"):
        assert isinstance(read_adapter(folder).config, FunLoraConfig)
