"""What deleting and pulling must leave alone: links, folders in use, bases that are needed."""

from __future__ import annotations

import shutil
import warnings

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from forks import held
from runs import digests, make_tiny_unet, write_adapters

from funlora_hf import FunLoraPipeline, delete_class, push_all
from funlora_hf.hub.pull import pull
from funlora_hf.utils.locks import FolderInUseError


@pytest.mark.parametrize("linked", ["adapters/class_7", "adapters", "figures/class_7.png", "figures"])
def test_a_link_is_refused_before_anything_is_deleted(linked, run_folder, tmp_path):
    (run_folder / "figures").mkdir()
    (run_folder / "figures" / "class_7.png").write_bytes(b"x")
    (run_folder / linked).rename(tmp_path / "elsewhere")
    (run_folder / linked).symlink_to(tmp_path / "elsewhere")
    before = digests(tmp_path)
    with pytest.raises(ValueError, match="is a link"):
        delete_class(7, output_dir=run_folder)
    assert digests(tmp_path) == before


@pytest.fixture
def in_use(run_folder):
    """The folder, in which another process is at work."""
    with held(run_folder):
        yield run_folder


def test_a_folder_in_use_is_left_alone(in_use, tmp_path):
    before = digests(in_use / "adapters")
    with pytest.raises(FolderInUseError):
        delete_class(7, output_dir=in_use)
    shutil.copytree(in_use / "adapters" / "class_7", tmp_path / "source" / "class_9")
    config = tmp_path / "source" / "class_9" / "adapter_config.json"
    config.write_text(config.read_text().replace('"class_label": 7', '"class_label": 9'))
    with pytest.raises(FolderInUseError):
        pull(tmp_path / "source", in_use)
    assert digests(in_use / "adapters") == before


def test_a_class_of_the_base_is_refused_before_anything_is_deleted(run_folder):
    (run_folder / "figures").mkdir()
    (run_folder / "figures" / "class_3.png").write_bytes(b"x")
    before = digests(run_folder)
    for folder in (run_folder, run_folder / "base"):
        with pytest.raises(ValueError, match="`class_label` is 3, a class of the base"):
            delete_class(3, output_dir=folder)
    assert digests(run_folder) == before


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`output_dir` is '.*nowhere', but there is no such folder"):
        delete_class(7, output_dir=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_is_gone_afterwards(run_folder):
    assert delete_class(7, output_dir=run_folder) == ["output_dir"]
    assert sorted(path.name for path in run_folder.iterdir()) == ["adapters", "base"]


def test_pull_does_not_replace_the_base_of_other_adapters(run_folder, tmp_path):
    """One of the same weights it does."""
    unet = make_tiny_unet()
    source = tmp_path / "source"
    pipe = FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler(), [3, 5], {3: "other name"})
    pipe.save_pretrained(source / "base")
    pull(source, run_folder, with_base=True, overwrite=True)
    unet.conv_in.bias.data += 1
    pipe.save_pretrained(source / "base")
    before = digests(run_folder)
    with pytest.raises(ValueError, match=r"the base of class_7, class_8: pull into another folder"):
        pull(source, run_folder, with_base=True, overwrite=True)
    assert digests(run_folder) == before


@pytest.mark.parametrize("place", ["output_dir", "repo_id"])
def test_what_started_from_the_class_is_named(place, hub, run_folder, tiny_pipe):
    """Also what did so by way of another; not what started from others, and a damaged one is no hindrance."""
    for label, starts in ((9, {"class_7": "0" * 64}), (10, {"class_9": "1" * 64}), (11, {"class_8": "2" * 64})):
        write_adapters(tiny_pipe, run_folder, classes=[label], base=False, class_label=label, started_from=starts)
    push_all(run_folder, "me/mine")
    config = run_folder / "adapters" / "class_11" / "adapter_config.json"
    config.write_text("{")
    where = {"output_dir": run_folder, "repo_id": "me/mine"}[place]
    said = rf"^{where}: class_9, class_10 started from the deleted class_7 and .* --update_class 9 --update_mode cold`, with"
    with pytest.warns(UserWarning, match=said):
        assert delete_class(7, **{place: where}) == [place]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delete_class(10, **{place: where})
