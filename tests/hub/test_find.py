from __future__ import annotations

import shutil

import pytest

from funlora_hf.hub.find import find_contents


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def found(contents):
    names = [contents.name(path) for path in (contents.base, *contents.adapters, *contents.banks) if path]
    return [name.replace(str(contents.root), ".") for name in names]


ADAPTER = "adapter_config.json"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["base/model_index.json", f"adapters/class_10/{ADAPTER}", f"adapters/class_9/{ADAPTER}"], ["base", 9, 10]),
        (["base/model_index.json", "model/model_index.json"], ["model"]),
        (["model/model_index.json", "bank.safetensors"], ["model", "bank.safetensors"]),
        (["model_index.json", f"adapters/class_7/{ADAPTER}"], [".", 7]),
        (["config.json", "diffusion_pytorch_model.safetensors"], ["."]),
        ([ADAPTER, "adapter_model.safetensors"], ["."]),
        (["adapter_model.safetensors"], ["."]),
        (
            [f"adapters/class_x/{ADAPTER}", f"adapters/.writing-1-class_7/{ADAPTER}", "b.safetensors"],
            ["b.safetensors"],
        ),
    ],
)
def test_layouts(tmp_path, files, expected):
    touch(tmp_path, *files, "results.json", "figures/class_7.png")
    expected = [f"adapters/class_{name}" if isinstance(name, int) else name for name in expected]
    assert found(find_contents(tmp_path)) == expected


def test_adapters_in_folders_of_other_names_are_named(tmp_path, recwarn):
    touch(
        tmp_path, f"adapters/class_7/{ADAPTER}", f"adapters/.writing-1-class_8/{ADAPTER}", "adapters/notes/adapter.txt"
    )
    assert found(find_contents(tmp_path)) == ["adapters/class_7"]
    assert not recwarn.list
    touch(tmp_path, f"adapters/Class_5/{ADAPTER}", f"cat/{ADAPTER}")
    with pytest.warns(UserWarning, match=r"not named class_<id> and are left out: Class_5, cat\.$"):
        assert found(find_contents(tmp_path)) == ["adapters/class_7"]


def test_a_repository_is_fetched_no_further_than_asked(hub, tmp_path):
    files = [
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "classes.json"),
        *(f"class_{label}/{name}" for label in (7, 8) for name in (ADAPTER, "adapter_model.safetensors", "other.py")),
        *("vae/config.json", "unet/diffusion_pytorch_model.bin", "optimizer.safetensors", "run.py"),
    ]
    hub.commit("user/digits", dict.fromkeys(files, b"{}"))
    one = find_contents("user/digits", classes=[8], with_base=False)
    assert (one.base, [folder.name for folder in one.adapters]) == (None, ["class_8"])
    assert sorted(path.relative_to(one.root).as_posix() for path in one.root.rglob("*") if path.is_file()) == [
        f"class_8/{ADAPTER}",
        "class_8/adapter_model.safetensors",
    ]
    everything = find_contents("user/digits")
    assert found(everything) == ["user/digits", "class_7", "class_8"]
    there = {path.relative_to(one.root).as_posix() for path in one.root.rglob("*") if path.is_file()}
    assert there == set(files[:4]) | {name for name in files[4:10] if not name.endswith(".py")}
    requests = len(hub.requests)
    assert found(find_contents("user/digits", local_files_only=True)) == found(everything)
    assert len(hub.requests) == requests


def test_classes_that_are_not_there(tmp_path):
    touch(tmp_path, f"class_7/{ADAPTER}", f"class_8/{ADAPTER}")
    assert found(find_contents(tmp_path, classes=[8])) == ["class_8"]
    with pytest.raises(FileNotFoundError, match=r"has no class_1, class_9, expected class_7, class_8"):
        find_contents(tmp_path, classes=[9, 8, 1])
    shutil.rmtree(tmp_path / "class_7")
    shutil.rmtree(tmp_path / "class_8")
    with pytest.raises(FileNotFoundError, match="has neither a base nor an adapter nor a bank"):
        find_contents(tmp_path)


def test_a_subfolder_of_a_repository(hub):
    hub.commit("user/digits", {f"deep/class_7/{ADAPTER}": b"{}", f"class_8/{ADAPTER}": b"{}"})
    assert found(find_contents("user/digits", subfolder="deep")) == ["class_7"]
    with pytest.raises(ValueError, match="expected a place inside the repository"):
        find_contents("user/digits", subfolder="../deep")


def test_a_revision_of_a_folder_is_refused(tmp_path):
    (tmp_path / "class_7").mkdir()
    with pytest.raises(ValueError, match=r"`revision` is 'v1', but .* is a folder, which has none"):
        find_contents(tmp_path, revision="v1")
