"""The test Hub against the real client: what other tests rely on when they push and pull through it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from hub_server import READ_TOKEN, HubServer
from huggingface_hub import (
    _CACHED_NO_EXIST,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from funlora_hf import FunLoraPipeline


REPO = "user/model"
WEIGHTS = bytes(range(256)) * 512  # 128 KiB, and LFS by its name below
# The class of this error is of the HTTP library, which is another one in each major version of huggingface_hub.
DROPPED = "disconnected|closed connection|reset by peer|Broken pipe"


@pytest.fixture
def api() -> HfApi:
    return HfApi()


def cached_blobs() -> set[str]:
    return {path.name for path in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*")}


def test_create_repo_once_or_with_exist_ok(hub, api):
    assert str(api.create_repo(REPO)) == f"{hub.url}/{REPO}"
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert hub.repos() == [REPO]
    assert list(hub.files(REPO)) == [".gitattributes"]
    assert api.repo_exists(REPO)


def test_delete_repo(hub, api):
    hub.create(REPO)
    api.delete_repo(REPO)
    assert hub.repos() == []
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)
    api.delete_repo(REPO, missing_ok=True)


def test_whoami(hub, api):
    assert api.whoami()["name"] == "user"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")


def test_one_commit_of_regular_and_lfs_files(hub, api):
    api.create_repo(REPO)
    done = api.create_commit(
        REPO,
        [CommitOperationAdd("config.json", b"{}"), CommitOperationAdd("unet/weights.safetensors", WEIGHTS)],
        commit_message="Both",
        commit_description="of them",
    )
    assert hub.files(REPO).items() >= {"config.json": b"{}", "unet/weights.safetensors": WEIGHTS}.items()
    newest, initial = hub.commits(REPO)
    assert (newest.oid, newest.message, newest.description) == (done.oid, "Both", "of them")
    assert newest.parent == initial.oid
    assert {path for path, stored in newest.files.items() if stored.lfs} == {"unet/weights.safetensors"}
    # the content of the LFS file went by PUT, once, and was verified
    assert [path for method, path in hub.requests if method == "PUT"] == [
        f"/lfs/{REPO}/{hashlib.sha256(WEIGHTS).hexdigest()}"
    ]
    assert ("POST", f"/{REPO}.git/info/lfs/objects/verify") in hub.requests


def test_upload_folder_and_file(hub, api, tmp_path):
    api.create_repo(REPO)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "sub" / "b.bin").write_bytes(b"\0b")
    (tmp_path / "c.log").write_bytes(b"c")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path, path_in_repo="run", ignore_patterns=["*.log"])
    api.upload_file(repo_id=REPO, path_or_fileobj=tmp_path / "a.txt", path_in_repo="alone.txt")
    expected = {"run/a.txt": b"a", "run/sub/b.bin": b"\0b", "run/empty.safetensors": b"", "alone.txt": b"a"}
    assert {path: content for path, content in hub.files(REPO).items() if path != ".gitattributes"} == expected
    assert len(hub.commits(REPO)) == 3


def test_an_lfs_file_of_several_megabytes(hub, api, tmp_path):
    api.create_repo(REPO)
    content = os.urandom(3 * 1024 * 1024)
    (tmp_path / "weights.safetensors").write_bytes(content)
    api.upload_file(repo_id=REPO, path_or_fileobj=tmp_path / "weights.safetensors", path_in_repo="w.safetensors")
    assert hub.files(REPO)["w.safetensors"] == content


def test_unchanged_files_make_no_commit(hub, api):
    operations = {"a.txt": b"a", "w.safetensors": WEIGHTS}
    head = hub.commit(REPO, operations)
    done = api.create_commit(
        REPO, [CommitOperationAdd(path, content) for path, content in operations.items()], commit_message="Again"
    )
    assert done.oid == head
    assert hub.commits(REPO)[0].oid == head
    assert not [path for method, path in hub.requests if "/commit/" in path or method == "PUT"]


def test_files_that_gitignore_names_are_skipped(hub, api, tmp_path):
    hub.commit(REPO, {".gitignore": b"# notes\n*.log\nsecret/\n"})
    for name in ("a.log", "secret/b.txt", "kept.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path)
    assert sorted(hub.files(REPO)) == [".gitattributes", ".gitignore", "kept.txt"]


def test_listing(hub, api):
    head = hub.commit(REPO, {"a.txt": b"a", "unet/x/w.safetensors": WEIGHTS}, "First")
    later = hub.commit(REPO, {"b.txt": b"b"}, "Second")
    assert sorted(api.list_repo_files(REPO)) == [".gitattributes", "a.txt", "b.txt", "unet/x/w.safetensors"]
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [".gitattributes", "a.txt", "b.txt", "unet"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "unet", recursive=True)] == [
        "unet/x",
        "unet/x/w.safetensors",
    ]
    entries = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True, expand=True)}
    weights = entries["unet/x/w.safetensors"]
    assert (weights.size, weights.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert entries["unet"].last_commit.oid == head
    assert entries["b.txt"].last_commit.title == "Second"
    assert api.list_repo_tree(REPO, revision=head) is not None
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))

    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == later
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes["unet/x/w.safetensors"] == len(WEIGHTS)
    assert api.model_info(REPO, revision=head).sha == head
    assert [found.path for found in api.get_paths_info(REPO, ["a.txt", "unet", "missing"])] == ["a.txt", "unet"]
    assert api.file_exists(REPO, "a.txt")
    assert not api.file_exists(REPO, "z.txt")
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["Second", "First", "initial commit"]


def test_blob_ids_are_gits(hub, api, tmp_path):
    hub.commit(REPO, {"a.txt": b"some text\n"})
    (tmp_path / "a.txt").write_bytes(b"some text\n")
    expected = subprocess.run(
        ["git", "hash-object", "--no-filters", str(tmp_path / "a.txt")], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert api.get_paths_info(REPO, "a.txt")[0].blob_id == expected


def test_download_with_subfolder_and_revision(hub):
    first = hub.commit(REPO, {"unet/w.safetensors": WEIGHTS, "a.txt": b"one"})
    hub.commit(REPO, {"a.txt": b"two"})
    assert Path(hf_hub_download(REPO, "w.safetensors", subfolder="unet")).read_bytes() == WEIGHTS
    assert Path(hf_hub_download(REPO, "a.txt")).read_bytes() == b"two"
    assert Path(hf_hub_download(REPO, "a.txt", revision=first)).read_bytes() == b"one"
    assert hashlib.sha256(WEIGHTS).hexdigest() in cached_blobs()


def test_a_second_download_fetches_nothing(hub):
    hub.commit(REPO, {"a.txt": b"one"})
    path = hf_hub_download(REPO, "a.txt")
    hub.requests.clear()
    assert hf_hub_download(REPO, "a.txt") == path
    assert hub.requests == [("HEAD", f"/{REPO}/resolve/main/a.txt")]
    hub.requests.clear()
    assert hf_hub_download(REPO, "a.txt", local_files_only=True) == path
    assert hub.requests == []
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "b.txt", local_files_only=True)


def test_the_cache_is_empty_again(hub):
    assert cached_blobs() == set()
    assert hub.repos() == []


def test_snapshot_download_with_patterns(hub):
    hub.commit(REPO, {"a.txt": b"a", "unet/config.json": b"{}", "unet/w.safetensors": WEIGHTS})
    folder = Path(snapshot_download(REPO, allow_patterns=["unet/*"], ignore_patterns=["*.json"]))
    assert [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] == ["unet/w.safetensors"]
    assert not [path for _, path in hub.requests if path.endswith("a.txt")]
    whole = Path(snapshot_download(REPO))
    assert (whole / "a.txt").read_bytes() == b"a"
    assert snapshot_download(REPO, local_files_only=True) == str(whole)


def test_tags_and_branches(hub, api):
    head = hub.commit(REPO, {"a.txt": b"1"})
    api.create_tag(REPO, tag="v1", tag_message="The first")
    with pytest.raises(HfHubHTTPError, match="Tag reference exists already") as error:
        api.create_tag(REPO, tag="v1")
    assert error.value.response.status_code == 409
    api.create_tag(REPO, tag="v1", exist_ok=True)
    hub.commit(REPO, {"a.txt": b"2"})
    api.create_branch(REPO, branch="try/this", revision="v1")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"3", path_in_repo="b.txt", revision="try/this")

    refs = api.list_repo_refs(REPO)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": head} == hub.tags(REPO)
    assert {branch.name for branch in refs.branches} == {"main", "try/this"}
    assert Path(hf_hub_download(REPO, "a.txt", revision="v1")).read_bytes() == b"1"
    assert set(hub.files(REPO, "try/this")) - set(hub.files(REPO)) == {"b.txt"}
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="try/this")
    assert hub.tags(REPO) == {}
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(REPO, tag="v2", revision="nowhere")


def test_what_is_missing(hub, api):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/nothing", "a.txt")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/nothing", token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(repo_id="user/nothing", path_or_fileobj=b"", path_in_repo="a.txt")
    hub.commit(REPO, {"a.txt": b"1"})
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "a.txt", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "b.txt")
    assert try_to_load_from_cache(REPO, "b.txt") is _CACHED_NO_EXIST


def test_delete_files_and_folders(hub, api):
    hub.commit(REPO, {"a.txt": b"1", "unet/x.txt": b"2", "unet/y/z.txt": b"3"})
    api.delete_folder("unet/y", REPO)
    api.create_commit(REPO, [CommitOperationDelete("a.txt")], commit_message="Delete")
    assert sorted(hub.files(REPO)) == [".gitattributes", "unet/x.txt"]
    api.upload_folder(repo_id=REPO, folder_path=Path(__file__).parent, allow_patterns=[], delete_patterns=["unet/*"])
    assert sorted(hub.files(REPO)) == [".gitattributes"]
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("a.txt", REPO)


def test_model_card(hub, api):
    api.create_repo(REPO)
    card = ModelCard.from_template(
        ModelCardData(license="mit", library_name="peft", tags=["funlora"], base_model="user/base"),
        template_str="---\n{{ card_data }}\n---\n# Title\n",
    )
    card.push_to_hub(REPO)
    loaded = ModelCard.load(REPO)
    assert loaded.data.to_dict() == card.data.to_dict()
    assert api.model_info(REPO).card_data.base_model == "user/base"
    hub.commit("user/other", {"a.txt": b"1"})
    assert [info.id for info in api.list_models(author="user", filter="funlora")] == [REPO]


def test_models_of_diffusers_and_peft(hub, tiny_unet):
    tiny_unet.push_to_hub("user/unet")
    loaded = UNet2DModel.from_pretrained("user/unet")
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= set(hub.files("user/unet"))
    for name, weight in tiny_unet.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    adapted = get_peft_model(tiny_unet, LoraConfig(target_modules=["conv1"], init_lora_weights=False))
    adapted.push_to_hub("user/adapter")
    pulled = PeftModel.from_pretrained(loaded, "user/adapter")
    expected = get_peft_model_state_dict(adapted)
    assert expected
    for name, weight in get_peft_model_state_dict(pulled).items():
        assert torch.equal(weight, expected[name]), name


def test_a_pipeline_of_diffusers(hub, tiny_pipe):
    tiny_pipe.push_to_hub("user/pipeline")
    pulled = FunLoraPipeline.from_pretrained("user/pipeline")
    assert pulled.config["class_ids"] == tiny_pipe.config["class_ids"]
    for name, weight in tiny_pipe.unet.state_dict().items():
        assert torch.equal(weight, pulled.unet.state_dict()[name]), name


def test_cards_that_the_hub_refuses(hub, api):
    api.create_repo(REPO)
    wrong_base = b"---\nbase_model: /home/someone/base\n---\n"
    with pytest.raises(ValueError, match="base_model"):
        api.upload_file(repo_id=REPO, path_or_fileobj=wrong_base, path_in_repo="README.md")
    with pytest.raises(ValueError, match="YAML"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"# Title", path_in_repo="README.md")


def test_who_may_read_and_write(hub, api):
    hub.create("user/private", private=True)
    hub.commit("user/gated", {"a.txt": b"1"})
    hub.create("user/gated")
    api.update_repo_settings("user/gated", gated="manual")
    hub.create("user/hidden")
    api.update_repo_settings("user/hidden", private=True)
    assert api.model_info("user/private").private
    for token in (False, READ_TOKEN):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("user/private", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("user/hidden", token=token)
        with pytest.raises(GatedRepoError, match="restricted"):
            hf_hub_download("user/gated", "a.txt", token=token)
        with pytest.raises(HfHubHTTPError):
            api.upload_file(repo_id="user/gated", path_or_fileobj=b"", path_in_repo="a", token=token)
        with pytest.raises(HfHubHTTPError):
            api.create_repo("user/new", token=token)
    assert hub.repos() == ["user/gated", "user/hidden", "user/private"]
    assert len(hub.commits("user/gated")) == 2


def test_a_stale_token(hub, api):
    hub.commit(REPO, {"a.txt": b"1"})
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as error:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt", token="hf_stale")
    assert error.value.response.status_code == 401
    assert not isinstance(error.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        hf_hub_download(REPO, "a.txt", token="hf_stale")
    assert hub.files(REPO)["a.txt"] == b"1"


def test_super_squash(hub, api):
    first = hub.commit(REPO, {"a.txt": b"1"})
    api.create_tag(REPO, tag="v1")
    second = hub.commit(REPO, {"a.txt": b"2"})
    hub.commit(REPO, {"b.txt": b"3"})
    files = hub.files(REPO)
    api.super_squash_history(REPO, commit_message="One")
    assert [commit.message for commit in hub.commits(REPO)] == ["One"]
    assert hub.files(REPO) == files
    assert hub.tags(REPO) == {"v1": first}
    assert api.model_info(REPO, revision=first).sha == first
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision=second)


# What goes wrong on request


def test_a_failing_commit_is_not_retried_and_changes_nothing(hub, api, waits):
    head = hub.commit(REPO, {"a.txt": b"1"})
    hub.fail(method="POST", path="/commit/main$", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt")
    assert hub.commits(REPO)[0].oid == head
    assert waits == []
    api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt")
    assert hub.files(REPO)["a.txt"] == b"2"


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


def test_an_upload_that_never_succeeds_makes_no_commit(hub, api, waits):
    api.create_repo(REPO)
    hub.fail(method="PUT", status=503, times=None)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'w\.safetensors'"):
        api.upload_file(repo_id=REPO, path_or_fileobj=WEIGHTS, path_in_repo="w.safetensors")
    assert len(waits) == 5
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_the_rate_limit_says_how_long_to_wait(hub, waits):
    hub.commit(REPO, {"a.txt": b"1"})
    hub.fail(method="GET", path="/resolve/", status=429, headers={"Retry-After": "7"})
    assert Path(hf_hub_download(REPO, "a.txt")).read_bytes() == b"1"
    assert waits == [8]  # a second more than it was told


def test_a_failing_head_is_retried_without_a_cached_file_and_falls_back_to_one(hub, waits):
    hub.commit(REPO, {"a.txt": b"1"})
    hub.fail(method="HEAD", status=500, times=2)
    path = hf_hub_download(REPO, "a.txt")
    assert waits == [1]
    hub.commit(REPO, {"a.txt": b"2"})
    hub.fail(method="HEAD", status=500, times=None)
    assert hf_hub_download(REPO, "a.txt") == path
    assert waits == [1]
    assert Path(path).read_bytes() == b"1"


def test_a_failing_get_is_an_error_and_leaves_no_file(hub, waits):
    hub.commit(REPO, {"a.txt": b"1"})
    hub.fail(method="GET", path="/resolve/", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        hf_hub_download(REPO, "a.txt")
    assert cached_blobs() == set()


def test_a_download_that_is_cut_resumes(hub, waits):
    hub.commit(REPO, {"w.safetensors": WEIGHTS})
    hub.cut(method="GET", path="/resolve/", after_bytes=1000, times=2)
    assert Path(hf_hub_download(REPO, "w.safetensors")).read_bytes() == WEIGHTS
    assert waits == [1, 1]
    assert hub.requests.count(("GET", f"/{REPO}/resolve/main/w.safetensors")) == 3


def test_parts_of_a_file(hub):
    hub.commit(REPO, {"w.safetensors": WEIGHTS})

    def part(asked: str):
        url = f"{hub.url}/{REPO}/resolve/main/w.safetensors"
        return urllib.request.urlopen(urllib.request.Request(url, headers={"Range": asked}))

    with part("bytes=1000-1003") as answer:
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes 1000-1003/{len(WEIGHTS)}"
        assert answer.read() == WEIGHTS[1000:1004]
    with part("bytes=1000-") as answer:
        assert answer.read() == WEIGHTS[1000:]
    with pytest.raises(urllib.error.HTTPError, match="416"):
        part(f"bytes={len(WEIGHTS)}-")


def test_a_download_that_is_always_cut_leaves_no_file(hub, waits):
    hub.commit(REPO, {"w.safetensors": WEIGHTS})
    hub.cut(method="GET", path="/resolve/", after_bytes=0, times=None)
    with pytest.raises(Exception, match=DROPPED):
        hf_hub_download(REPO, "w.safetensors")
    assert len(waits) == 5
    assert not [name for name in cached_blobs() if not name.endswith(".incomplete")]
    hub.clear_faults()
    assert Path(hf_hub_download(REPO, "w.safetensors")).read_bytes() == WEIGHTS


def test_an_upload_that_is_cut_is_retried(hub, api, waits):
    api.create_repo(REPO)
    hub.cut(method="PUT", path="^/lfs/", after_bytes=1000)
    api.upload_file(repo_id=REPO, path_or_fileobj=WEIGHTS, path_in_repo="w.safetensors")
    assert hub.files(REPO)["w.safetensors"] == WEIGHTS
    assert waits == [1]


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


def test_content_of_another_length_is_refused_by_the_client(hub):
    hub.commit(REPO, {"w.safetensors": WEIGHTS})
    hub.corrupt("w.safetensors", lambda content: content[:1000])
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(REPO, "w.safetensors")
    assert not [name for name in cached_blobs() if not name.endswith(".incomplete")]


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


def test_races_come_one_at_a_time(hub, api):
    hub.create(REPO)
    hub.race(REPO, {"theirs.txt": b"1"})
    hub.race(REPO, {"theirs.txt": b"2"})
    api.upload_file(repo_id=REPO, path_or_fileobj=b"", path_in_repo="a.txt")
    assert hub.files(REPO)["theirs.txt"] == b"1"
    api.upload_file(repo_id=REPO, path_or_fileobj=b"", path_in_repo="b.txt")
    assert hub.files(REPO)["theirs.txt"] == b"2"
    assert len(hub.commits(REPO)) == 5


def test_clients_at_the_same_time(hub, api):
    hub.create(REPO)
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(api.upload_file, repo_id=REPO, path_or_fileobj=b"%d" % i, path_in_repo=f"{i}.bin")
            for i in range(16)
        ]:
            done.result()
    assert hub.files(REPO).items() >= {f"{i}.bin": b"%d" % i for i in range(16)}.items()
    assert len(hub.commits(REPO)) == 17


def test_a_server_that_is_gone(hub):
    other = HubServer()
    other.start()
    url = other.url
    other.commit(REPO, {"a.txt": b"1"})
    path = hf_hub_download(REPO, "a.txt", endpoint=url)
    other.stop()
    with pytest.raises(Exception, match=r"refused|Cannot connect"):
        HfApi(endpoint=url).model_info(REPO)
    assert hf_hub_download(REPO, "a.txt", endpoint=url) == path


def test_skip_hits_a_later_request(hub, api):
    hub.create(REPO)
    hub.fail(method="POST", path="/commit/", status=400, message="Not now", skip=1)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="a.txt")
    with pytest.raises(BadRequestError, match="Not now"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt")
    assert hub.files(REPO)["a.txt"] == b"1"


def test_a_pointer_without_its_content_is_refused(hub, api):
    hub.create(REPO)
    operation = CommitOperationAdd("w.safetensors", WEIGHTS)
    operation._upload_mode, operation._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        api.create_commit(REPO, [operation], commit_message="Pointer")


def test_mistakes_of_the_server_are_told(hub):
    request = urllib.request.Request(f"{hub.url}/api/repos/create", data=b"no JSON", method="POST")
    request.add_header("Authorization", "Bearer hf_test")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 500
    assert "JSONDecodeError" in hub.errors.pop()


def test_a_process_of_its_own(hub):
    hub.commit(REPO, {"a.txt": b"1"})
    program = (
        "import huggingface_hub as h; print(open(h.hf_hub_download('user/model', 'a.txt')).read());"
        "h.HfApi().upload_file(repo_id='user/model', path_or_fileobj=b'2', path_in_repo='b.txt')"
    )
    environment = {**os.environ, **hub.environment}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "1"
    assert hub.files(REPO)["b.txt"] == b"2"
