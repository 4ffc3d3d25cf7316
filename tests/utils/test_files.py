from __future__ import annotations

import errno
import hashlib
import math
import shutil

import pytest
from safetensors import SafetensorError

from funlora_hf.utils.files import (
    WriteError,
    folder_sha256,
    read_json,
    recover_folder,
    remove_folder,
    whole_file,
    whole_folder,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    with whole_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("killed_before", [False, True])
def test_a_folder_takes_the_place_of_the_old_one(killed_before, tmp_path):
    if killed_before:  # after the second rename
        (tmp_path / ".replaced-a").mkdir()
        (tmp_path / ".replaced-a" / "x").write_text("older")
    for content in ("old", "new"):
        with whole_folder(tmp_path / "a") as temporary:
            (temporary / content).write_text(content)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new"]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_what_cannot_be_written_is_named_with_its_cause(whole, tmp_path):
    (tmp_path / "a").write_text("a file, where a folder is wanted")
    with (
        pytest.raises(
            WriteError, match=r"a/b could not be written \(.*(Not a directory|File exists).*Make room"
        ) as error,
        whole(tmp_path / "a" / "b"),
    ):
        pytest.fail("nothing can be written here")
    assert error.value.errno == error.value.__cause__.errno
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_an_error_on_the_way_leaves_the_old_and_is_named_once(error, tmp_path):
    write_json(tmp_path / "a" / "b.json", 1)
    with pytest.raises(WriteError) as raised, whole_folder(tmp_path / "a") as folder, whole_file(folder / "c"):
        raise error
    assert str(raised.value).count("could not be written") == 1
    assert raised.value.errno == getattr(error, "errno", None)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["b.json"]


def test_a_removed_folder_is_gone_or_cleaned_up_later(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        remove_folder(tmp_path / "a")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".writing-")
    recover_folder(tmp_path)
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == []


def test_recovery_after_a_kill_between_the_two_renames(tmp_path):
    (tmp_path / ".replaced-a").mkdir()
    (tmp_path / ".replaced-a" / "x").write_text("old")
    (tmp_path / ".writing-0-b").mkdir()
    recover_folder(tmp_path)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "old"


def test_recovery_after_a_kill_behind_the_second_rename(tmp_path):
    for folder, content in ((".replaced-a", "old"), ("a", "new")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").write_text(content)
    recover_folder(tmp_path)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "new"


def test_json_refuses_what_json_has_not(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None]})
    assert read_json(tmp_path / "a.json") == {"b": [1, None]}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", math.nan)
    assert read_json(tmp_path / "a.json") == {"b": [1, None]}
    for text in ("NaN", "[-Infinity]", "1e999", "[" * 100_000, "\xff"):
        (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"a\.json' is not a valid JSON file"):
            read_json(tmp_path / "a.json")


def test_the_hash_sees_names_and_bytes_but_not_what_is_left_out(tmp_path):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_bytes(b"1")
    expected = hashlib.sha256(b"sub/x\0" + hashlib.sha256(b"1").digest()).hexdigest()
    assert folder_sha256(folder) == expected
    (folder / "adapters").mkdir()
    (folder / "adapters" / "y").write_bytes(b"2")
    assert folder_sha256(folder) != expected
    assert folder_sha256(folder, leave_out=["adapters"]) == expected
    (folder / "sub" / "x").write_bytes(b"2")
    assert folder_sha256(folder, leave_out=["adapters"]) != expected
