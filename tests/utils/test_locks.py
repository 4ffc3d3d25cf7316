"""Two processes, one of which is killed, on one folder."""

from __future__ import annotations

import json
import os
import time

import pytest
from forks import held

from funlora_hf.utils.locks import FolderInUseError, folder_lock


@pytest.fixture
def holder(tmp_path):
    with held(tmp_path) as process:
        yield process


def test_the_second_is_told_who_holds_it_and_since_when(holder, tmp_path):
    owner = tmp_path / ".funlora.owner.json"
    record = json.loads(owner.read_text())
    owner.write_text(json.dumps({**record, "since": time.time() - 3600}))
    with (
        pytest.raises(
            FolderInUseError, match=rf"in use by process {holder.pid} on {os.uname().nodename}, for 60\.0 min"
        ),
        folder_lock(tmp_path),
    ):
        pytest.fail("two at once")
    assert holder.is_alive()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"process": 1, "host": "h", "since": "then"}'])
def test_an_owner_who_has_said_nothing_yet_holds_it_all_the_same(content, holder, tmp_path):
    (tmp_path / ".funlora.owner.json").write_text(content)
    with pytest.raises(FolderInUseError, match="an unknown process"), folder_lock(tmp_path):
        pytest.fail("two at once")


def test_the_lock_of_a_killed_process_is_taken_over_with_a_warning(holder, tmp_path, caplog):
    holder.kill()
    holder.join()
    assert (tmp_path / ".funlora.owner.json").is_file()
    with folder_lock(tmp_path):
        assert f"from process {holder.pid}" in caplog.text
        assert json.loads((tmp_path / ".funlora.owner.json").read_text())["process"] == os.getpid()


def test_a_released_folder_is_as_it_was(tmp_path, caplog):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), folder_lock(tmp_path / "new"):
            raise KeyboardInterrupt
        assert list((tmp_path / "new").iterdir()) == []
    assert caplog.text == ""


def test_it_is_no_lock_on_the_folder_below(holder, tmp_path):
    with folder_lock(tmp_path / "below"):
        assert holder.is_alive()
