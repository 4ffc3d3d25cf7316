"""Classes added to runs, bases and repositories: what appears, what stays, what goes on after a kill, what is refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from runs import digests, run_in, short_run
from safetensors.numpy import load_file
from write_events import on_write

from funlora_hf import BaseMismatchError, FunLoraPipeline
from funlora_hf.add import SETTINGS, add_classes
from funlora_hf.cli import main
from funlora_hf.continual.base import find_base
from funlora_hf.hub import delete_class, push_all
from funlora_hf.hub.describe import describe
from funlora_hf.hub.verify import verify
from funlora_hf.run import run
from funlora_hf.utils.files import read_json, write_json
from funlora_hf.utils.locks import FolderInUseError, folder_lock


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
REPO = "me/mine"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run that has learned 0 to 3 as its base and adapters of 4 to 7, of the ten digits; not to be changed."""
    changes = {"num_tasks": 2, "num_samples_per_class": 2, "image_quality": "none", "adapter_learning_rate": 1e-2}
    return run_in(tmp_path_factory.mktemp("finished"), **changes)


@pytest.fixture
def inside(finished, tmp_path, monkeypatch):
    """A place with a copy of it, out/, and images of a class, cross/."""
    shutil.copytree(finished, tmp_path / "out")
    draw(tmp_path / "cross")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(folder: Path, count: int = 5) -> Path:
    """A folder of images, others for each name."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(list(folder.name.encode()))
    for index in range(count):
        PIL.Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def differing(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_a_folder_of_images_becomes_a_class_of_the_run(inside):
    before, results = digests(inside / "out"), read_json(inside / "out" / "results.json")
    added = add_classes("cross", "out")
    assert (added.base, added.output_dir, added.trained) == ("out", Path("out"), (8,))
    changed = differing(before, digests(inside / "out"))
    records = {name for name in changed if name.startswith("checkpoints/added/")}
    assert changed - records == {
        "results.json",
        *(f"adapters/class_8/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")),
    }
    now = read_json(inside / "out" / "results.json")
    assert {**now, "added": {}} == results  # the matrix among others
    (entry,) = now["added"].values()
    assert added.classes == {8: entry}
    assert (entry["class_name"], entry["source"], entry["images"]) == ("cross", "cross", 5)
    assert entry["seconds"] > 0
    assert entry["date"].startswith("20")
    recipe = entry["recipe"]["ContinualTrainingArguments"]
    assert (recipe["adapter_train_steps"], recipe["adapter_learning_rate"], recipe["seed"]) == (8, 1e-2, 0)
    pipe = FunLoraPipeline.from_pretrained("out/base")
    pipe.load_adapter("out/adapters/class_8")
    assert len(pipe(["cross", 8, 1], num_inference_steps=1).images) == 3


def test_an_adapter_is_that_of_a_run_which_learns_the_class(inside):
    """By the same id, seed and images, but those that the run is tested on."""
    shutil.copytree("cross", "images/train/cross")
    draw(inside / "images" / "test" / "cross", 1)
    same = {"adapter_train_steps": 3, "adapter_learning_rate": 1e-2}
    run(short_run(base_model="out/base", dataset_name="images", output_dir="more", **same))
    add_classes("cross", "out", **same)
    assert digests(inside / "out" / "adapters" / "class_8") == digests(inside / "more" / "adapters" / "class_8")


def test_other_commands_see_the_class(inside, hub):
    add_classes("cross", "out", class_name="a cross")
    assert "a cross" in [one.class_name for one in describe("out").adapters]
    assert all(verdict.ok for verdict in verify("out"))
    push_all("out", REPO)
    card = hub.files(REPO)["class_8/README.md"].decode()
    assert "| data set | cross |" in card
    assert "| steps | 8 |" in card
    assert "| data set | digits |" in hub.files(REPO)["class_7/README.md"].decode()
    assert set(hub.tags(REPO)) >= {"task-1", "task-2"}
    assert "task-3" not in hub.tags(REPO)
    before = digests(inside / "out")
    delete_class(8, output_dir="out")
    changed = differing(before, digests(inside / "out"))
    assert changed == {"results.json"} | {name for name in changed if "class_8" in name}
    assert read_json(inside / "out" / "results.json")["added"] == {}
    assert not list((inside / "out").rglob("*class_8*"))


def test_several_classes_and_the_same_again(inside):
    draw(inside / "images" / "b")
    draw(inside / "images" / "a")
    assert add_classes("images", "out", adapter_train_steps=1).trained == (8, 9)
    before = digests(inside / "out")
    again = add_classes("images", "out", adapter_train_steps=1)
    assert (again.trained, {c: one["class_name"] for c, one in again.classes.items()}) == ((), {8: "a", 9: "b"})
    assert digests(inside / "out") == before
    # Some are there, one is new.
    draw(inside / "images" / "0th")
    assert add_classes("images", "out", adapter_train_steps=1).trained == (10,)
    with pytest.raises(
        ValueError,
        match=r"classes that already exist.* 10 \(0th\), 8 \(a\), 9 \(b\).*train --output_dir out --update_class 10 --dataset_name images "
        r".*--adapter_train_steps 2\b",
    ):
        add_classes("images", "out", adapter_train_steps=2)


def test_what_is_there_is_not_trained_again(inside):
    draw(inside / "images" / "7")
    draw(inside / "images" / "2")
    draw(inside / "images" / "new")
    before = digests(inside / "out")
    with pytest.raises(
        ValueError, match=r"`images` 'images' has classes that already exist.*: 2 \(2\), 7 \(7\)\. Nothing"
    ):
        add_classes("images", "out")
    assert digests(inside / "out") == before


def test_an_added_class_is_trained_again_by_update_class(inside):
    add_classes("cross", "out")
    before = digests(inside / "out")
    run(short_run(dataset_name="cross", update_class=8, max_images_per_class=None))
    assert differing(before, digests(inside / "out")) == {"adapters/class_8/adapter_model.safetensors"}


def test_update_class_finds_an_added_class_by_a_name_that_the_run_never_learned(inside):
    """The run has planned the digit "9" under the id 9."""
    add_classes(draw(inside / "9"), "out")
    before = digests(inside / "out")
    run(short_run(dataset_name="9", update_class=8, max_images_per_class=None))
    assert differing(before, digests(inside / "out")) == {"adapters/class_8/adapter_model.safetensors"}


def test_epochs_are_steps_in_the_command_that_trains_a_class_again(inside):
    """3 images in batches of 2 are 2 steps an epoch; the recipe for digits counts steps, and would refuse both."""
    settings = {"adapter_epochs": 5, "adapter_batch_size": 2}
    add_classes("cross", "out", **settings)
    shutil.rmtree("cross")
    draw(inside / "other", 3).rename("cross")
    with pytest.raises(ValueError, match="To train the adapter of class 8 again: `funlora train") as error:
        add_classes("cross", "out", **settings)
    command = shlex.split(str(error.value).partition("`funlora ")[2].partition("`")[0])
    assert "--adapter_epochs" not in command
    assert command[command.index("--adapter_train_steps") + 1] == "10"
    before = digests(inside / "out")
    assert main(command) == 0
    assert differing(before, digests(inside / "out")) == {"adapters/class_8/adapter_model.safetensors"}


def test_an_added_class_starts_at_the_mean_of_those_there(inside):
    """Of those with its configuration; not of one that is added by the same call."""
    draw(inside / "images" / "a")
    draw(inside / "images" / "b")
    still = {"adapter_start": "mean", "adapter_train_steps": 1, "adapter_learning_rate": 1e-30}
    add_classes("images", "out", **still)
    add_classes("cross", "out", function="power", **still)
    add_classes(draw(inside / "star"), "out", **still)
    for class_id, starts in {8: (4, 5, 6, 7), 9: (4, 5, 6, 7), 10: (), 11: range(4, 10)}.items():
        folder = inside / "out" / "adapters" / f"class_{class_id}"
        started_from = read_json(folder / "adapter_config.json")["started_from"]
        assert set(started_from or ()) == {f"class_{c}" for c in starts}, class_id
        files = [load_file(folder.parent / name / "adapter_model.safetensors") for name in started_from or ()]
        for key, tensor in load_file(folder / "adapter_model.safetensors").items() if files else ():
            np.testing.assert_allclose(tensor, np.mean([file[key] for file in files], 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["cold", "mean"])
def test_a_killed_add_goes_on_to_the_same_bytes(start, inside):
    draw(inside / "images" / "a")
    draw(inside / "images" / "b")
    settings = {"checkpointing_steps": 2, "adapter_train_steps": 5, "adapter_start": start}
    operations = add_and_die(inside, 0, settings)
    expected, listed = digests(inside / "out" / "adapters"), untimed(inside / "out")
    seen = set()
    for number in (operations // 6, 5 * operations // 6, operations - 4):
        shutil.rmtree("out")
        shutil.copytree("copy", "out")
        add_and_die(inside, number, settings)
        seen.add(len(list((inside / "out" / "adapters").glob("class_[89]"))))
        add_classes("images", "out", **settings)
        assert digests(inside / "out" / "adapters") == expected, number
        assert untimed(inside / "out") == listed
    assert seen == {0, 1, 2}  # met at all stages


def add_and_die(inside: Path, number: int, settings: dict) -> int:
    """Add images/ to out/ in a process that is killed before its operation of this number on a file; 0: it is not, and how many
    there are is returned. copy/ keeps out/ as it was."""
    if not Path("copy").exists():
        shutil.copytree("out", "copy")
    process = os.fork()
    if process == 0:
        status = 1
        try:
            seen = []

            def tell(event: str, path: str) -> None:
                if path.startswith(f"{os.path.realpath('out')}{os.sep}"):
                    seen.append(path)
                    if len(seen) == number:
                        os.kill(os.getpid(), signal.SIGKILL)

            on_write(tell)
            add_classes("images", "out", **settings)
            write_json(inside / "operations.json", len(seen))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if number else 0)
    return read_json(inside / "operations.json")


def untimed(folder: Path) -> dict:
    added = read_json(folder / "results.json")["added"]
    return {c: {**one, "seconds": 0, "date": ""} for c, one in added.items()}


def test_other_images_start_again_under_the_same_id(inside, capsys, caplog):
    """What was begun of others is no part of it."""
    add_classes("cross", "out", adapter_train_steps=4)
    expected = digests(inside / "out" / "adapters")
    shutil.rmtree("out/adapters/class_8")
    shutil.rmtree("cross")
    draw(inside / "other", 3).rename("cross")
    assert main(["info", "out"]) == 0
    assert "unfinished class 8 (cross). To go on: the `funlora add` command" in capsys.readouterr().out
    assert main(["info", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unfinished_classes"] == {"8": "cross"}
    assert "dropped" not in caplog.text
    add_classes("cross", "out", adapter_train_steps=5)
    assert "(adapter_train_steps was 4 and is 5, other images): its steps so far are dropped" in caplog.text
    assert differing(expected, digests(inside / "out" / "adapters")) == {"class_8/adapter_model.safetensors"}
    assert read_json(inside / "out" / "results.json")["added"]["8"]["images"] == 3


def test_an_unfinished_run_keeps_its_ids_and_goes_on(inside):
    expected, results = digests(inside / "out" / "adapters"), read_json(inside / "out" / "results.json")
    unfinish(inside / "out")
    draw(inside / "images" / "7")
    with pytest.raises(ValueError, match=r"has yet to learn: 7 \(7\)"):
        add_classes("images", "out")
    # 8 and 9 are ids of the data set, though of no task.
    assert add_classes("cross", "out").trained == (10,)
    arguments = {"num_tasks": 2, "num_samples_per_class": 2, "image_quality": "none", "adapter_learning_rate": 1e-2}
    now = run(short_run(resume_from_checkpoint="latest", **arguments))
    adapters = digests(inside / "out" / "adapters")
    assert differing(expected, adapters) == {name for name in adapters if "class_10" in name}
    assert list(now["added"]) == ["10"]
    for name in (
        "accuracy_matrix",
        "tasks",
        "memory",
        "memory_per_task",
        "layer_importance",
        "training_images_per_task",
    ):
        assert now[name] == results[name], name


def unfinish(folder: Path) -> None:
    """What a run leaves that was killed before its last class was learned."""
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "adapters" / "class_7")
    for path in ("strategy/task_2.safetensors", "evaluation/task_2.json"):
        (folder / "checkpoints" / path).unlink()


def test_ids_are_free_beside_banks_and_the_classes_of_an_output_dir(inside, finished):
    from funlora_hf import AdapterBank, FunLoraConfig

    pipe = FunLoraPipeline.from_pretrained("out/base")
    bank = AdapterBank(pipe.unet, FunLoraConfig.from_pretrained("out/adapters/class_7"))
    bank.add("out/adapters/class_7", class_label=20, class_name="in a bank")
    bank.save("out/bank.safetensors")
    assert list(find_base("out/base").taken) == [4, 5, 6, 7, 20]
    added = add_classes("cross", "out", output_dir="mine", adapter_train_steps=1)
    assert (added.base, added.output_dir, added.trained) == ("out", Path("mine"), (21,))
    assert not differing(digests(finished), digests(inside / "out")) - {"bank.safetensors"}
    assert list(added.classes) == [21]
    draw(inside / "star")
    assert add_classes("star", "out/base", output_dir="mine", adapter_train_steps=1).trained == (22,)
    draw(inside / "in a bank")
    with pytest.raises(ValueError, match=r"already exist.*20 \(in a bank\)"):
        add_classes("in a bank", "out")
    assert all(verdict.ok for verdict in verify("mine", base="out"))


def test_training_on_a_run_counts_its_adapters(inside):
    base = find_base("out")
    assert (base.folder, base.source, list(base.taken)) == (Path("out/base"), "./out/base/unet", [4, 5, 6, 7])
    draw(inside / "images" / "new")
    run(
        short_run(
            base_model="out", dataset_name="images", output_dir="more", max_train_steps=1, max_images_per_class=None
        )
    )
    assert [path.name for path in (inside / "more" / "adapters").iterdir()] == ["class_8"]
    with pytest.raises(ValueError, match="`overwrite_output_dir` would delete out/base, which contains `base_model`"):
        run(short_run(base_model="out", dataset_name="images", overwrite_output_dir=True))
    # A run on a base from elsewhere gets more of its own.
    assert add_classes("cross", "more", adapter_train_steps=1).base == "out"
    assert (inside / "more" / "adapters" / "class_9").is_dir()


def test_a_repository_counts_what_is_pushed(inside, hub):
    push_all("out", REPO)
    with pytest.raises(ValueError, match=r"`output_dir` is None, but `to` 'me/mine' is not a run"):
        add_classes("cross", REPO)
    added = add_classes("cross", REPO, output_dir="mine", adapter_train_steps=1)
    assert (added.base, added.trained) == (REPO, (8,))
    # Without a run, the defaults of FunLoRA.
    assert added.classes[8]["recipe"]["ContinualTrainingArguments"]["adapter_learning_rate"] == 3e-2
    config = read_json(inside / "mine" / "adapters" / "class_8" / "adapter_config.json")
    assert config["base_model_name_or_path"] == REPO
    draw(inside / "7")
    with pytest.raises(ValueError, match=r"already exist.*7 \(7\)"):
        add_classes("7", REPO, output_dir="mine")


def test_arguments_override_the_run_s_recipe(inside):
    added = add_classes("cross", "out", adapter_epochs=2, function="power", max_images_per_class=4, seed=3)
    recipe = added.classes[8]["recipe"]
    assert recipe["ModelArguments"]["function"] == "power"
    training = recipe["ContinualTrainingArguments"]
    assert (training["adapter_epochs"], training["adapter_train_steps"], training["seed"]) == (2, None, 3)
    assert added.classes[8]["images"] == 4
    assert "output_dir" not in SETTINGS


def test_a_locked_run_is_left_alone(inside):
    before = digests(inside / "out")
    with folder_lock(inside / "out"), pytest.raises(FolderInUseError):
        add_classes("cross", "out")
    assert digests(inside / "out") == before


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"base_train_steps": 3},
            ValueError,
            "`base_train_steps` is not an argument of `add`, expected some of: .*seed",
        ),
        ({"adapter_learning_rate": -1.0}, ValueError, "`adapter_learning_rate` is -1"),
        ({"images": "./nothing"}, FileNotFoundError, "looks like a local path"),
        (
            {"images": "cros"},
            FileNotFoundError,
            "`images` is 'cros': nothing here has this name; did you mean 'cross'",
        ),
        ({"images": "owls"}, FileNotFoundError, "`images` is 'owls', which is no file or folder here.*owner/name"),
        ({"to": "out/bas"}, FileNotFoundError, "`to` is 'out/bas': nothing .*; did you mean 'out/base'"),
        (
            {"images": "empty"},
            FileNotFoundError,
            "^images='empty' has no image and no subfolder: expected images of one class, or one subfolder",
        ),
        ({"images": "broken"}, ValueError, "'broken', split 'train', row 1: the image of class 'broken'"),
        (
            {"images": "two", "class_name": "x"},
            ValueError,
            "`class_name` is 'x', expected the name of the one class.* 2: a, b",
        ),
        ({"class_name": " "}, ValueError, "`class_name` is ' '"),
        ({"revision": "main"}, ValueError, "`revision` is 'main', but `to` 'out' is a folder"),
        ({"to": "cross", "output_dir": "mine"}, FileNotFoundError, "`to` is 'cross', expected a pipeline folder"),
        (
            {"to": "./nowhere", "output_dir": "mine"},
            FileNotFoundError,
            "`to` './nowhere' is neither a folder that is there nor the name of a repository",
        ),
        ({"to": "out/base"}, ValueError, "`output_dir` is None, but `to` 'out/base' is not a run: give a folder"),
        (
            {"to": "out/base", "output_dir": "out"},
            ValueError,
            "`output_dir` 'out' contains a base: name it by `to`",
        ),
        (
            {"peft_method": "lora_conv_v1"},
            ValueError,
            "`peft_method` 'lora_conv_v1' makes adapters of type .*, expected FUNLORA",
        ),
        (
            {"to": "joint"},
            ValueError,
            "`to` is a run of `strategy` 'joint', which has no adapters.*joint/model, as `to`, and give an `output_dir`",
        ),
    ],
)
def test_what_cannot_be_is_named_and_nothing_is_written(arguments, error, text, inside):
    draw(inside / "broken")
    (inside / "broken" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    draw(inside / "two" / "a")
    draw(inside / "two" / "b")
    (inside / "empty").mkdir()
    shutil.copytree("out/base", "joint/model")
    write_json(inside / "joint" / "checkpoints" / "run.json", {"ContinualTrainingArguments": {"strategy": "joint"}})
    before = digests(inside)
    with pytest.raises(error, match=text):
        add_classes(**{"images": "cross", "to": "out", **arguments})
    assert digests(inside) == before
    assert not (inside / "mine").exists()


@pytest.mark.parametrize("arguments", [{"to": "out"}, {"to": "out/base", "output_dir": "out_of_it"}])
def test_a_base_that_is_not_that_of_the_adapters_gets_no_class(arguments, inside):
    shutil.copytree("out/adapters", "out_of_it/adapters")
    config = Path("out/base/unet/config.json")
    write_json(config, {**read_json(config), "act_fn": "relu"})
    before = digests(inside)
    with pytest.raises(BaseMismatchError, match="class_4' was trained for another base"):
        add_classes("cross", **arguments)
    assert digests(inside) == before


def test_from_the_command_line_to_a_picture(inside, capsys, caplog):
    (inside / "recipe.yaml").write_text("adapter_train_steps: 2\nbase_train_steps: 9\noutput_dir: other\n")
    caplog.set_level("INFO")
    recipe = ["add", "cross", "--to", "out", "--class_name", "7th", "--config", "recipe.yaml"]
    assert main([*recipe, "--time_limit_minutes", "1e-9"]) == 75
    assert capsys.readouterr().err.endswith("What is learned is kept; the same command goes on.\n")
    assert main(recipe) == 0
    assert "recipe.yaml: left out, only for `funlora train`: base_train_steps, output_dir" in caplog.text
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("class 8 (7th): learned from 5 images in ")
    assert said[1] == "To see them: funlora sample out --class_label 8"
    assert main([*said[1].partition("funlora ")[2].split(), "--num_images", "1", "--num_inference_steps", "1"]) == 0
    assert "row 1: 8 (7th)" in capsys.readouterr().out
    assert main(["add", "cross", "--to", "out", "--class_name", "7th", "--adapter_train_steps", "2"]) == 0
    assert "class 8 (7th): already exists, learned from 5 images" in capsys.readouterr().out
    assert main(["add", "cross", "--to", "out", "--class_name", "7"]) == 1
    assert "error: `images` 'cross' has classes that already exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["add", "cross", "--to", "out", "--base_train_steps", "2"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main(["add", "--help"])
    assert "--adapter_train_steps" in capsys.readouterr().out
