"""Pushing, loading and deleting through the real client, against a Hub on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from runs import digests, short_run, write_adapters
from safetensors.torch import load, load_file, save_file

import funlora_hf
from funlora_hf import (
    AdapterBank,
    BaseMismatchError,
    FunLoraConfig,
    FunLoraPipeline,
    base_fingerprint,
    base_fingerprints,
    delete_class,
    load_adapter,
    push_adapter,
    push_all,
    push_base,
)
from funlora_hf.run import run
from funlora_hf.utils.files import read_json, write_json


REPO = "user/digits"


@pytest.fixture
def run_folder(tiny_pipe, tmp_path):
    """A run of three tasks: the base's 3 and 5, then 7, then 8 and 9."""
    folder = tmp_path / "out"
    fingerprint = base_fingerprints(tiny_pipe.unet)
    write_adapters(tiny_pipe, folder, classes=[], base_fingerprint=fingerprint)
    for label in (7, 8, 9):
        write_adapters(
            tiny_pipe,
            folder,
            classes=[label],
            base=False,
            class_label=label,
            class_name=f"name {label}",
            base_fingerprint=fingerprint,
        )
    config = folder / "adapters" / "class_7" / "adapter_config.json"
    write_json(config, {**read_json(config), "base_model_name_or_path": str(folder / "base" / "unet")})
    results = {"tasks": [[3, 5], [7], [8, 9]], "LA": 90.0, "AIA": 95.0, "dataset": "digits", "seed": 0}
    write_json(folder / "results.json", {**results, "settings": {"DataArguments": {"dataset_name": "/home/me/x"}}})
    return folder


def messages(hub, repo=REPO):
    return [commit.message for commit in reversed(hub.commits(repo)) if commit.message != "initial commit"]


def contents(hub, repo=REPO):
    return {name: content for name, content in hub.files(repo).items() if name != ".gitattributes"}


def velocity(pipe, label):
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.predict_velocity(sample, torch.tensor([0.3, 0.8]), [label] * 2)


def test_a_run_s_generator_is_pushed_rather_than_its_base(tiny_pipe, tmp_path, hub):
    """Of strategies with one generator for all classes: `base/` is what they started from."""
    tiny_pipe.save_pretrained(tmp_path / "out" / "base")
    with torch.no_grad():
        for parameter in tiny_pipe.unet.parameters():
            parameter.add_(1)
    tiny_pipe.save_pretrained(tmp_path / "out" / "model")
    push_all(tmp_path / "out", REPO)
    pulled = FunLoraPipeline.from_pretrained(REPO).unet.state_dict()
    for key, tensor in tiny_pipe.unet.state_dict().items():
        assert torch.equal(pulled[key], tensor), key


def test_a_run_is_pushed_task_by_task(hub, run_folder):
    before = digests(run_folder)
    commits = push_all(run_folder, REPO)
    assert [commit.oid for commit in commits] == [commit.oid for commit in reversed(hub.commits(REPO))][1:]
    assert messages(hub) == ["Task 1: base", "Task 2: class 7 (name 7)", "Task 3: class 8 (name 8), 9 (name 9)"]
    (base_tag,) = hub.tags(REPO).keys() - {"task-1", "task-2", "task-3"}
    fingerprint = base_fingerprint(UNet2DModel.from_pretrained(run_folder / "base" / "unet"))
    assert base_tag.startswith(f"base-{fingerprint[:12]}-")
    assert hub.tags(REPO) == {
        "task-1": commits[0].oid,
        "task-2": commits[1].oid,
        "task-3": commits[2].oid,
        base_tag: commits[0].oid,
    }
    files = contents(hub)
    base = {
        path.relative_to(run_folder / "base").as_posix()
        for path in (run_folder / "base").rglob("*")
        if path.is_file() and "adapters" not in path.parts
    }
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    expected = base | {f"class_{label}/{name}" for label in (7, 8, 9) for name in adapter}
    assert files.keys() == expected | {"README.md", "classes.json"}
    for label in (7, 8, 9):
        mine = run_folder / "adapters" / f"class_{label}"
        assert files[f"class_{label}/adapter_model.safetensors"] == (mine / "adapter_model.safetensors").read_bytes()
        config = json.loads(files[f"class_{label}/adapter_config.json"])
        assert (config["base_model_name_or_path"], config["revision"]) == (REPO, base_tag)
    assert not any(str(run_folder).encode() in content or b"/home/me" in content for content in files.values())
    assert digests(run_folder) == before


@pytest.mark.parametrize("change", ["settings", "classes"])
def test_a_base_of_the_same_weights_and_other_settings_has_a_tag_of_its_own(change, hub, run_folder):
    push_base(run_folder / "base", REPO)
    (before,) = hub.tags(REPO)
    file = run_folder / "base" / ("unet/config.json" if change == "settings" else "model_index.json")
    new = {"act_fn": "relu"} if change == "settings" else {"id2label": {"3": "drei", "5": "five"}}
    write_json(file, {**read_json(file), **new})
    push_base(run_folder / "base", REPO)
    (after,) = hub.tags(REPO).keys() - {before}
    old, now = (FunLoraPipeline.from_pretrained(REPO, revision=tag) for tag in (before, after))
    assert (old.unet.config.act_fn, now.unet.config.act_fn) == ("silu", new.get("act_fn", "silu"))
    assert (old.classes == now.classes) == (change == "settings")
    push_base(run_folder / "base", REPO)
    assert hub.tags(REPO).keys() == {before, after}


def test_earlier_commits_show_what_was_there_then(hub, run_folder):
    _, second, _ = push_all(run_folder, REPO)
    then = hub.files(REPO, second.oid)
    assert "class_7/adapter_config.json" in then
    assert not any(name.startswith(("class_8", "class_9")) for name in then)
    assert "name 7" in then["README.md"].decode()
    assert "name 8" not in then["README.md"].decode()


def test_what_is_there_already_makes_no_commit(hub, run_folder):
    push_all(run_folder, REPO)
    commits, tags = hub.commits(REPO), hub.tags(REPO)
    assert push_all(run_folder, REPO) == []
    assert hub.commits(REPO) == commits
    assert hub.tags(REPO) == tags
    write_json(run_folder / "results.json", {**read_json(run_folder / "results.json"), "LA": 91.0})
    (commit,) = push_all(run_folder, REPO)
    changed = {n for n, c in hub.files(REPO).items() if hub.files(REPO, commits[0].oid).get(n) != c}
    assert changed == {"README.md", "classes.json", *(f"class_{label}/README.md" for label in (7, 8, 9))}
    assert hub.tags(REPO) == tags
    assert commit.commit_message == "Update"


def test_another_process_loads_what_one_has_pushed(hub, run_folder, tmp_path):
    push_all(run_folder, REPO)
    code = f"""
import torch, funlora_hf
pipe = funlora_hf.FunLoraPipeline.from_pretrained("{REPO}")
label = pipe.load_adapter("{REPO}", subfolder="class_9")
assert label == 9 and pipe.classes == {{3: "three", 5: "5", 9: "name 9"}}
sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    output = pipe.predict_velocity(sample, torch.tensor([0.3, 0.8]), [9] * 2)
torch.save(output, "output.pt")
from peft import PeftModel
from diffusers import UNet2DModel
unet = UNet2DModel.from_pretrained("{REPO}", subfolder="unet")
model = PeftModel.from_pretrained(unet, "{REPO}", subfolder="class_9").eval()
with torch.no_grad():
    stock = model(sample, torch.tensor([300.0, 800.0]), torch.zeros(2, dtype=torch.long)).sample
torch.testing.assert_close(stock, output)
"""
    environment = {**hub.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(funlora_hf.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **environment, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pipe = FunLoraPipeline.from_pretrained(run_folder / "base")
    pipe.load_adapter(run_folder / "adapters" / "class_9")
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), velocity(pipe, 9))
    pushed = hub.files(REPO)["class_9/adapter_model.safetensors"]
    mine = load_file(run_folder / "adapters" / "class_9" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, mine[key]) for key, tensor in load(pushed).items())


def test_a_base_elsewhere(hub, run_folder, tiny_pipe):
    assert push_base(tiny_pipe, "user/base") is not None
    assert push_base(tiny_pipe, "user/base") is None
    push_all(run_folder, REPO, base_model="user/base", base_revision="main")
    files = contents(hub)
    assert not any(name.startswith(("unet", "model_index")) for name in files)
    assert json.loads(files["class_7/adapter_config.json"])["base_model_name_or_path"] == "user/base"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("user/base", "adapter")
    bank = AdapterBank.from_hub(REPO, classes=[7, 9])
    assert bank.classes == {7: "name 7", 9: "name 9"}


def test_a_base_that_nobody_can_find_is_warned_of(hub, run_folder):
    shutil.rmtree(run_folder / "base")
    with pytest.warns(UserWarning, match=r"without the name of its base.*`base_model`"):
        push_all(run_folder, REPO)
    files = contents(hub)
    assert json.loads(files["class_7/adapter_config.json"])["base_model_name_or_path"] is None
    assert "has not been published" in files["class_7/README.md"].decode()


def test_a_bank_from_the_hub_and_from_its_cache(hub, run_folder):
    push_all(run_folder, REPO)
    bank = AdapterBank.from_hub(REPO, classes=[9, 7])
    fetched = [path for method, path in hub.requests if method == "GET" and "safetensors" in path and "class_" in path]
    assert {path.rpartition("/")[0].rpartition("/")[2] for path in fetched} == {"class_7", "class_9"}
    asked = len(hub.requests)
    again = AdapterBank.from_hub(REPO, classes=[9, 7], local_files_only=True)
    assert len(hub.requests) == asked
    pipe = FunLoraPipeline.from_pretrained(run_folder / "base")
    pipe.load_adapter(run_folder / "adapters" / "class_9")
    for one in (bank, again):
        one.activate(9)
        sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            output = one.model(sample, torch.tensor([300.0, 800.0]), torch.zeros(2, dtype=torch.long)).sample
        torch.testing.assert_close(output, velocity(pipe, 9))
    assert list(AdapterBank.from_hub(REPO).classes) == [7, 8, 9]
    with pytest.raises(FileNotFoundError, match="class_12"):
        AdapterBank.from_hub(REPO, classes=[12])
    other = UNet2DModel.from_pretrained(run_folder / "base", subfolder="unet")
    other.conv_in.bias.data += 1
    with pytest.raises(BaseMismatchError):
        AdapterBank.from_hub(REPO, other)
    assert not any("funlora" in name for name in other.state_dict())
    assert len(AdapterBank.from_hub(REPO, other, ignore_base_fingerprint=True)) == 3


def test_load_adapter_gives_a_peft_model(hub, run_folder):
    push_all(run_folder, REPO)
    unet = UNet2DModel.from_pretrained(REPO, subfolder="unet")
    model = load_adapter(unet, REPO, subfolder="class_7")
    assert isinstance(model, PeftModel)
    model = load_adapter(model, run_folder / "adapters" / "class_8", adapter_name="eight")
    assert list(model.peft_config) == ["class_7", "eight"]
    with pytest.raises(ValueError, match="`adapter_name` is 'eight', which the model has already"):
        load_adapter(model, REPO, subfolder="class_9", adapter_name="eight")
    model.set_adapter("eight")
    pipe = FunLoraPipeline.from_pretrained(run_folder / "base")
    pipe.load_adapter(run_folder / "adapters" / "class_8")
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(sample, torch.tensor([300.0, 800.0]), torch.zeros(2, dtype=torch.long)).sample
    torch.testing.assert_close(output, velocity(pipe, 8))


def test_one_adapter_of_a_model(hub, tiny_unet):
    config = FunLoraConfig(class_embedding="class_embedding", init_weights=False, class_name="mine")
    model = get_peft_model(tiny_unet, config, adapter_name="class_4")
    with pytest.warns(UserWarning, match="without the name of its base"):
        assert push_adapter(model, "class_4", REPO) is not None
    push_adapter(model, "class_4", REPO, base_model="user/base", license="mit")
    assert push_adapter(model, "class_4", REPO, base_model="user/base", license="mit") is None
    config = json.loads(contents(hub)["class_4/adapter_config.json"])
    assert (config["class_label"], config["class_name"]) == (4, "mine")
    assert config["base_fingerprint"] == base_fingerprints(tiny_unet)
    assert model.peft_config["class_4"].base_fingerprint is None
    push_adapter(model, "class_4", "user/own", subfolder=None, class_label=6, base_model="user/base")
    assert json.loads(contents(hub, "user/own")["adapter_config.json"])["class_label"] == 6
    with pytest.raises(ValueError, match="`adapter_name` is 'class_5', expected one of: class_4"):
        push_adapter(model, "class_5", REPO)


def test_stock_auto_classes_where_the_base_is_the_unet_itself(hub, tiny_unet, tmp_path):
    config = FunLoraConfig(class_embedding="class_embedding", init_weights=False)
    tiny_unet.save_pretrained(tmp_path)
    hub.commit("user/unet", {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    model = get_peft_model(tiny_unet, config, adapter_name="class_4").eval()
    push_adapter(model, "class_4", REPO, base_model="user/unet")
    assert "`AutoPeftModel` does not work here" in contents(hub)["class_4/README.md"].decode()
    code = 'unet = UNet2DModel.from_pretrained("user/unet")\npipe = FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler())'
    assert all(code in contents(hub)[f"{place}README.md"].decode() for place in ("", "class_4/"))
    push_adapter(model, "class_4", "user/own", base_model="user/unet", subfolder=None)
    assert "`AutoPeftModel` finds the U-Net by itself" in contents(hub, "user/own")["README.md"].decode()
    again = AutoPeftModel.from_pretrained("user/own").eval()
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, output = (m(sample, torch.tensor(300.0), torch.tensor([0, 1])).sample for m in (model, again))
    torch.testing.assert_close(output, expected)


def test_an_adapter_joins_others_in_their_repository(hub, run_folder, tiny_unet):
    push_all(run_folder, REPO)
    lora = get_peft_model(
        tiny_unet, LoraConfig(target_modules=["conv1"], init_lora_weights=False), adapter_name="mine"
    )
    with pytest.raises(ValueError, match="does not say which class it is"):
        push_adapter(lora, "mine", REPO, base_model=REPO)
    push_adapter(lora, "mine", REPO, class_label=20, class_name="twenty", base_model=REPO)
    card = contents(hub)["README.md"].decode()
    for text in ("library_name: diffusers", "name 7", "twenty", "name 9"):
        assert text in card
    assert push_all(run_folder, REPO) == []


def test_the_size_of_an_adapter_on_the_papers_backbone(tmp_path):
    """10,028 numbers and a class vector of 512 take 64 KB with their config at most."""
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=2,
    )
    fingerprint = dict.fromkeys(("float32", "bfloat16", "float16"), "0" * 64)
    config = FunLoraConfig(
        class_embedding="class_embedding", class_label=7, class_name="horse", base_fingerprint=fingerprint
    )
    assert funlora_hf.parameters_per_class(unet, config) == (10028, 10540)
    get_peft_model(unet, config).save_pretrained(tmp_path, save_embedding_layers=False)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.name != "README.md"}
    assert sizes.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(sizes.values()) <= 64 * 1024


def test_a_damaged_adapter_is_not_pushed(hub, run_folder):
    file = run_folder / "adapters" / "class_9" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        push_all(run_folder, REPO)
    assert REPO not in hub.repos()


@pytest.mark.parametrize("status", [500, 429, 503])
def test_a_busy_hub_is_asked_again(hub, waits, monkeypatch, run_folder, status):
    waited = []
    monkeypatch.setattr("funlora_hf.hub.repository.time.sleep", waited.append)
    hub.fail(method="POST", path="/commit/", status=status, times=2)
    push_all(run_folder, REPO)
    assert len(messages(hub)) == 3
    assert waited == [1.0, 2.0]


def test_a_hub_that_stays_down_shows_nothing_half(hub, waits, monkeypatch, run_folder):
    monkeypatch.setattr("funlora_hf.hub.repository.time.sleep", lambda seconds: None)
    hub.fail(method="POST", path="/commit/", status=500, times=10**6, skip=1)
    with pytest.raises(HfHubHTTPError):
        push_all(run_folder, REPO)
    assert messages(hub) == ["Task 1: base"]
    assert not any(name.startswith("class_") for name in contents(hub))
    hub.clear_faults()
    assert len(push_all(run_folder, REPO)) == 2
    assert len(messages(hub)) == 3


@pytest.mark.parametrize("what", ["upload", "answer"])
def test_a_push_that_broke_off_goes_on(hub, waits, run_folder, what):
    if what == "upload":
        hub.cut(method="PUT", path="", after_bytes=100, times=10**6)
    else:
        hub.lose_answer(method="POST", path="/commit/", skip=1)
    with pytest.raises(Exception):  # noqa: B017, PT011 - of the HTTP library that the client uses
        push_all(run_folder, REPO)
    hub.clear_faults()
    push_all(run_folder, REPO)
    assert len(messages(hub)) == 3
    assert {"task-1", "task-2", "task-3"} <= hub.tags(REPO).keys()
    assert push_all(run_folder, REPO) == []


def test_someone_elses_commit_is_kept(hub, run_folder):
    push_all(run_folder, REPO, tasks=[[3, 5], [7], [8, 9]])
    write_json(run_folder / "results.json", {**read_json(run_folder / "results.json"), "LA": 91.0})
    hub.race(REPO, {"notes.txt": b"theirs"})
    (commit,) = push_all(run_folder, REPO)
    assert contents(hub)["notes.txt"] == b"theirs"
    assert hub.commits(REPO)[0].oid == commit.oid


def test_a_stale_token_is_said(hub, run_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    with pytest.raises(HfHubHTTPError, match="401"):
        push_all(run_folder, REPO)
    assert REPO not in hub.repos()


@pytest.mark.parametrize("history", ["keep", "squash"])
def test_a_deleted_class_is_gone_everywhere(hub, run_folder, history):
    push_all(run_folder, REPO)
    pipe = FunLoraPipeline.from_pretrained(run_folder / "base")
    for label in (7, 8):
        pipe.load_adapter(run_folder / "adapters" / f"class_{label}")
    bank = AdapterBank.from_hub(REPO, classes=[7, 8])
    before = velocity(pipe, 8)
    (run_folder / "figures").mkdir()
    for name in ("class_7.png", "class_8.png", "samples_task_1.png", "samples_task_2.png", "samples_task_3.png"):
        (run_folder / "figures" / name).touch()
    samples = run_folder / "figures" / "samples.safetensors"
    save_file({f"task_{task}/class_{label}": torch.full((1,), label) for task in (1, 2) for label in (7, 8)}, samples)
    places = delete_class(7, pipeline=pipe, bank=bank, output_dir=run_folder, repo_id=REPO, history=history)
    assert places == ["repo_id", "pipeline", "bank", "output_dir"]
    assert 7 not in pipe.classes
    assert 7 not in bank
    assert torch.equal(velocity(pipe, 8), before)
    assert not (run_folder / "adapters" / "class_7").exists()
    kept = {"class_8.png", "samples_task_1.png", "samples.safetensors"}
    assert {path.name for path in (run_folder / "figures").iterdir()} == kept
    assert {key: value.item() for key, value in load_file(samples).items()} == {
        "task_1/class_8": 8,
        "task_2/class_8": 8,
    }
    files = contents(hub)
    assert not any(
        "class_7" in name or b"class_7" in content or b"name 7" in content for name, content in files.items()
    )
    assert "name 8" in files["README.md"].decode()
    if history == "squash":
        assert len(hub.commits(REPO)) == 1
        (tag,) = hub.tags(REPO)
        assert tag.startswith("base-")
    assert FunLoraPipeline.from_pretrained(REPO).load_adapter(REPO, subfolder="class_8") == 8
    (run_folder / "figures" / "class_8.png").unlink()
    assert push_all(run_folder, REPO) == []
    with pytest.raises(ValueError, match="`class_label` is 7, which none of the given places has"):
        delete_class(7, pipeline=pipe, bank=bank, output_dir=run_folder, repo_id=REPO)
    with pytest.raises(ValueError, match="`class_label` is 3, a class of the base"):
        delete_class(3, pipeline=pipe)


def test_a_damaged_class_of_someone_else_can_be_deleted(hub, run_folder):
    push_all(run_folder, REPO)
    bad = {"class_30/adapter_config.json": b"{", "class_30/adapter_model.safetensors": b"x"}
    hub.commit(REPO, bad)
    push_all(run_folder, REPO)
    assert "class_30" in contents(hub)["README.md"].decode()
    assert delete_class(30, repo_id=REPO) == ["repo_id"]
    assert not any("class_30" in name or b"class_30" in content for name, content in contents(hub).items())
    hub.commit("user/plain", {**bad, "README.md": b"mine"})
    delete_class(30, repo_id="user/plain")
    assert contents(hub, "user/plain") == {"README.md": b"mine"}


def test_an_adapter_in_a_folder_of_another_name_is_listed_and_deleted(hub, run_folder, tiny_unet):
    push_all(run_folder, REPO)
    config = FunLoraConfig(class_embedding="class_embedding", init_weights=False)
    model = get_peft_model(tiny_unet, config, adapter_name="class_20")
    push_adapter(model, "class_20", REPO, subfolder="more/of_<id>", base_model=REPO)
    for _ in range(2):
        assert f"(https://huggingface.co/{REPO}/tree/main/more/of_20)" in contents(hub)["README.md"].decode()
        assert push_all(run_folder, REPO) == []
    assert delete_class(20, repo_id=REPO) == ["repo_id"]
    assert not any("of_20" in name or b"of_20" in content for name, content in contents(hub).items())


@pytest.mark.parametrize("strategy", ["funlora", "joint"])
def test_a_run_pushes_itself(hub, tmp_path, strategy):
    arguments = short_run(
        output_dir=str(tmp_path / "digits"), push_to_hub=True, strategy=strategy, hub_license="mit", base_train_steps=4
    )
    run(arguments)
    assert "README.md" in contents(hub)
    assert ModelCard(contents(hub)["README.md"].decode()).data.license == "mit"
    if strategy == "joint":
        assert messages(hub) == ["Task 1: base", "Update"]
        return
    assert [message[:6] for message in messages(hub)] == ["Task 1", "Task 2", "Task 3"]
    files = contents(hub)
    assert files["class_9/samples.png"] == (tmp_path / "digits" / "figures" / "class_9.png").read_bytes()
    card = ModelCard(files["class_9/README.md"].decode())
    assert {result.metric_value for result in card.data.eval_results}
    assert "`" + json.loads(files["class_9/adapter_config.json"])["base_fingerprint"]["float16"] + "`" in card.text
    arguments.training.resume_from_checkpoint, commits = "latest", hub.commits(REPO)
    run(arguments)
    assert hub.commits(REPO) == commits
    pipe = FunLoraPipeline.from_pretrained(REPO)
    assert pipe.load_adapter(REPO, subfolder="class_9") == 9


def test_a_hub_that_fails_stops_no_training(hub, waits, monkeypatch, tmp_path):
    monkeypatch.setattr("funlora_hf.hub.repository.time.sleep", lambda seconds: None)
    hub.fail(method="POST", path="/commit/", status=500, times=12)
    run(short_run(output_dir=str(tmp_path / "digits"), push_to_hub=True, hub_model_id=REPO))
    assert [message[:6] for message in messages(hub)] == ["Task 1", "Task 2", "Task 3"]


def test_a_token_that_may_not_write_is_found_before_training(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    with pytest.raises(HfHubHTTPError):
        run(short_run(output_dir=str(tmp_path / "digits"), push_to_hub=True))
    assert not (tmp_path / "digits" / "base").exists()
