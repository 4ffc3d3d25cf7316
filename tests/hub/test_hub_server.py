"""The test Hub against the real client: what other tests rely on when they push and pull through it."""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


REPO = "user/model"
WEIGHTS = bytes(range(256)) * 512  # 128 KiB, and LFS by its name below
# The class of this error is of the HTTP library, which is another one in each major version of huggingface_hub.
DROPPED = "disconnected|closed connection|reset by peer|Broken pipe"


@pytest.fixture
def api() -> HfApi:
    return HfApi()


def test_create_repo_once_or_with_exist_ok(hub, api):
    assert str(api.create_repo(REPO)) == f"{hub.url}/{REPO}"
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert hub.repos() == [REPO]


def test_one_commit_of_regular_and_lfs_files_and_of_deletions(hub, api):
    api.create_repo(REPO)
    contents = {"config.json": b"{}", "unet/weights.safetensors": WEIGHTS}
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    done = api.create_commit(REPO, operations, commit_message="Both")
    assert hub.files(REPO).items() >= contents.items()
    newest, initial = hub.commits(REPO)
    assert (newest.oid, newest.message, newest.parent) == (done.oid, "Both", initial.oid)
    assert {path for path, stored in newest.files.items() if stored.lfs} == {"unet/weights.safetensors"}
    # The content of the LFS file went by PUT, once, and was verified.
    assert [path for method, path in hub.requests if method == "PUT"] == [
        f"/lfs/{REPO}/{hashlib.sha256(WEIGHTS).hexdigest()}"
    ]
    assert ("POST", f"/{REPO}.git/info/lfs/objects/verify") in hub.requests
    # What is there already makes no commit.
    asked = len(hub.requests)
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    assert api.create_commit(REPO, operations, commit_message="Again").oid == done.oid
    assert not [path for method, path in hub.requests[asked:] if "/commit/" in path or method == "PUT"]
    api.create_commit(REPO, [CommitOperationDelete("unet/", is_folder=True)], commit_message="Delete")
    assert sorted(hub.files(REPO)) == sorted(api.list_repo_files(REPO)) == [".gitattributes", "config.json"]
    assert api.repo_info(REPO).sha == hub.commits(REPO)[0].oid


def test_downloads_by_revision_and_from_the_cache(hub):
    first = hub.commit(REPO, {"unet/w.safetensors": WEIGHTS, "a.txt": b"one"})
    hub.commit(REPO, {"a.txt": b"two"})
    assert Path(hf_hub_download(REPO, "w.safetensors", subfolder="unet")).read_bytes() == WEIGHTS
    assert Path(hf_hub_download(REPO, "a.txt", revision=first)).read_bytes() == b"one"
    path = hf_hub_download(REPO, "a.txt")
    assert Path(path).read_bytes() == b"two"
    hub.requests.clear()
    assert hf_hub_download(REPO, "a.txt") == path
    assert hub.requests == [("HEAD", f"/{REPO}/resolve/main/a.txt")]
    hub.requests.clear()
    assert hf_hub_download(REPO, "a.txt", local_files_only=True) == path
    assert hub.requests == []
    folder = Path(snapshot_download(REPO, revision=first, allow_patterns=["unet/*"]))
    assert (folder / "unet" / "w.safetensors").read_bytes() == WEIGHTS


def test_tags_and_super_squash(hub, api):
    first = hub.commit(REPO, {"a.txt": b"1"})
    api.create_tag(REPO, tag="v1")
    with pytest.raises(HfHubHTTPError, match="Tag reference exists already"):
        api.create_tag(REPO, tag="v1")
    api.create_tag(REPO, tag="v1", exist_ok=True)
    second = hub.commit(REPO, {"a.txt": b"2"})
    api.create_tag(REPO, tag="v2")
    api.delete_tag(REPO, tag="v2")
    files = hub.files(REPO)
    api.super_squash_history(REPO, commit_message="One")
    assert [commit.message for commit in hub.commits(REPO)] == ["One"]
    assert hub.files(REPO) == files
    assert {tag.name: tag.target_commit for tag in api.list_repo_refs(REPO).tags} == {"v1": first} == hub.tags(REPO)
    assert api.model_info(REPO, revision="v1").sha == first
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision=second)


def test_what_is_missing_and_who_may_not_write(hub, api):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/nothing", "a.txt")
    hub.commit(REPO, {"a.txt": b"1"})
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "b.txt")
    for token, message in (("hf_stale", "Invalid credentials in Authorization header"), (False, "Invalid username")):
        with pytest.raises(HfHubHTTPError, match=message) as error:
            api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt", token=token)
        assert error.value.response.status_code == 401
    assert hub.files(REPO)["a.txt"] == b"1"


def test_cards_that_the_hub_refuses(hub, api):
    api.create_repo(REPO)
    wrong_base = b"---\nbase_model: /home/someone/base\n---\n"
    with pytest.raises(ValueError, match="base_model"):
        api.upload_file(repo_id=REPO, path_or_fileobj=wrong_base, path_in_repo="README.md")
    with pytest.raises(ValueError, match="YAML"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"# Title", path_in_repo="README.md")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/preupload/"), ("POST", "objects/batch$"), ("PUT", "^/lfs/"), ("POST", "objects/verify$")],
)
def test_uploads_are_retried(hub, api, waits, method, path):
    api.create_repo(REPO)
    hub.fail(method=method, path=path, status=500, times=2)
    api.upload_file(repo_id=REPO, path_or_fileobj=WEIGHTS, path_in_repo="w.safetensors")
    assert hub.files(REPO)["w.safetensors"] == WEIGHTS
    assert waits == [1, 2]
    matching = [request for request in hub.requests if request.method == method and re.search(path, request.path)]
    assert len(matching) == 3


def test_a_failing_commit_is_not_retried_and_changes_nothing(hub, api, waits):
    head = hub.commit(REPO, {"a.txt": b"1"})
    hub.fail(method="POST", path="/commit/main$", status=500, skip=1)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt")
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"3", path_in_repo="a.txt")
    assert hub.commits(REPO)[1].oid == head
    assert hub.files(REPO)["a.txt"] == b"2"
    assert waits == []


def test_a_download_that_is_cut_resumes(hub, waits):
    hub.commit(REPO, {"w.safetensors": WEIGHTS})
    hub.cut(method="GET", path="/resolve/", after_bytes=1000, times=2)
    assert Path(hf_hub_download(REPO, "w.safetensors")).read_bytes() == WEIGHTS
    assert waits == [1, 1]
    assert hub.requests.count(("GET", f"/{REPO}/resolve/main/w.safetensors")) == 3


def test_a_commit_that_is_cut_is_an_error(hub, api):
    head = hub.commit(REPO, {"a.txt": b"1"})
    hub.cut(method="POST", path="/commit/", after_bytes=10)
    with pytest.raises(Exception, match=DROPPED):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt")
    assert hub.commits(REPO)[0].oid == head


def test_a_commit_whose_answer_is_lost_has_been_made(hub, api):
    hub.create(REPO)
    hub.lose_answer(method="POST", path="/commit/")
    with pytest.raises(Exception, match=DROPPED):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt")
    assert hub.files(REPO)["a.txt"] == b"2"
    head = hub.commits(REPO)[0].oid
    assert api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt").oid == head


def test_flipped_bits_are_not_seen_by_the_client(hub):
    """Whoever needs to know has to check the hash."""
    hub.commit(REPO, {"w.safetensors": WEIGHTS})
    hub.corrupt("w.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]), times=1)
    path = hf_hub_download(REPO, "w.safetensors")
    assert Path(path).read_bytes()[-1] == WEIGHTS[-1] ^ 1
    assert Path(hf_hub_download(REPO, "w.safetensors", force_download=True)).read_bytes() == WEIGHTS


def test_someone_else_commits_first(hub, api):
    head = hub.commit(REPO, {"a.txt": b"1"})
    hub.race(REPO, {"b.txt": b"theirs"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt", parent_commit=head)
    assert error.value.response.status_code == 412
    assert hub.files(REPO).items() >= {"a.txt": b"1", "b.txt": b"theirs"}.items()
    now = hub.commits(REPO)[0].oid
    api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt", parent_commit=now)
    assert hub.files(REPO)["a.txt"] == b"2"


def test_mistakes_of_the_server_are_told(hub):
    request = urllib.request.Request(f"{hub.url}/api/repos/create", data=b"no JSON", method="POST")
    request.add_header("Authorization", "Bearer hf_test")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 500
    assert "JSONDecodeError" in hub.errors.pop()
