from __future__ import annotations

import re

import pytest
from diffusers import UNet2DModel
from huggingface_hub import HfApi

from funlora_hf import FunLoraPipeline
from funlora_hf.continual.base import find_base
from funlora_hf.data.class_ids import assign_class_ids
from funlora_hf.personalization.tiny import tiny_base


def test_a_base_without_a_class_embedding_is_named(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path)
    UNet2DModel.from_config(tiny_pipe.unet.config, num_class_embeds=None).save_pretrained(tmp_path / "unet")
    text = f"`base_model` '{tmp_path}' has a U-Net without a class embedding"
    with pytest.raises(ValueError, match=re.escape(text)):
        find_base(str(tmp_path))


def test_a_text_to_image_pipeline_is_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"`base_model` is '.*', a StableDiffusionPipeline, which reads prompts, expected .*pretrained=.*base\.",
    ):
        find_base(str(tiny_base()))


def repository(pipe, tmp_path, hub) -> str:
    """A base on the Hub, with classes of its own and of others; returns the commit."""
    pipe.save_pretrained(tmp_path / "pipe")
    files = {path.relative_to(tmp_path / "pipe").as_posix(): path for path in (tmp_path / "pipe").rglob("*.*")}
    contents = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    adapters = ("class_7/adapter_config.json", "adapters/class_11/adapter_config.json", "class_x/README.md", "class_3")
    return hub.commit("user/base", {**contents, **dict.fromkeys(adapters, b"{}")})


def test_ids_of_a_repository_s_adapters_are_taken(tiny_pipe, tmp_path, hub):
    repository(tiny_pipe, tmp_path, hub)
    base = find_base("user/base")
    assert base.source == "user/base"
    assert (base.classes, base.taken) == ({3: "three", 5: "5"}, {7: "7", 11: "11"})
    assert assign_class_ids(["three", "new"], base.classes, taken=base.taken) == [3, 12]


def test_ids_of_a_later_commit_are_taken_too(tiny_pipe, tmp_path, hub):
    first = repository(tiny_pipe, tmp_path, hub)
    hub.commit("user/base", {"class_20/adapter_config.json": b"{}"})
    assert find_base("user/base", revision=first).taken.keys() == {7, 11, 20}


def test_without_the_hub_the_warning_says_what_was_not_looked_at(tiny_pipe, tmp_path, hub, monkeypatch, caplog):
    repository(tiny_pipe, tmp_path, hub)

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "list_repo_files", fail)
    assert find_base("user/base").taken == {}
    assert "files of the repository 'user/base' could not be listed, so new classes may get ids" in caplog.text


@pytest.mark.parametrize(
    ("name", "asks"), [("nothere", True), ("user/nothere", True), ("a/b/c", False), ("./a", False)]
)
def test_what_is_neither_a_folder_nor_a_repository_is_said(name, asks, hub):
    for load in (find_base, FunLoraPipeline.from_pretrained):
        with pytest.raises(FileNotFoundError, match=f"{name}' is neither a folder that is there nor .*'user/repo'"):
            load(name)
    assert bool(hub.requests) == asks


def test_a_revision_of_a_folder_is_refused(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`base_model_revision` is 'v1', but `base_model` .* is a folder"):
        find_base(str(tmp_path), revision="v1")


def test_another_unet_than_the_base_s_is_refused(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path)
    find_base(str(tmp_path), unet_config={"sample_size": 8, "block_out_channels": [8, 16]})
    with pytest.raises(ValueError, match=r"`unet_config.sample_size` is 16, but the U-Net of `base_model` .* has 8"):
        find_base(str(tmp_path), unet_config={"sample_size": 16})
