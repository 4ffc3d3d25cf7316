"""The command: what it prints, writes and returns, and that errors are said in a few lines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import HfApi
from runs import REPOSITORY, command_line, digests, short_run, write_adapters

import funlora_hf
from funlora_hf import AdapterBank, FunLoraConfig, FunLoraPipeline, base_fingerprint, cli
from funlora_hf.cli import main
from funlora_hf.utils.files import read_json, write_json


REPO = "user/digits"


@pytest.fixture
def command(capsys):
    """Runs the command in this process; returns exit code, stdout and stderr."""

    def start(*arguments):
        try:
            code = main([os.fspath(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return start


@pytest.fixture
def fails(command):
    """Runs a command that must fail with a readable error, and returns that."""

    def start(*arguments):
        code, out, err = command(*arguments)
        assert (code, out) == (1, "")
        start_of_error = err.index("error: ")
        assert "Traceback" not in err
        assert len(err[start_of_error:].splitlines()) <= 12
        return err[start_of_error:]

    return start


def damage(run_folder, label=7):
    (run_folder / "adapters" / f"class_{label}" / "adapter_config.json").write_text("{")


def bank_of(run_folder, file):
    unet = FunLoraPipeline.from_pretrained(run_folder / "base").unet
    bank = AdapterBank(unet, FunLoraConfig.from_pretrained(run_folder / "adapters" / "class_7"))
    bank.add(run_folder / "adapters" / "class_7", class_label=17, class_name="from a bank")
    bank.save(file)
    return file


def pixels(file):
    with PIL.Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image)


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["evaluate"], ["recipes"], ["info"], ["sample"], ["push"], ["pull"], ["delete"], ["verify"]],
)
def test_help_says_the_exit_codes(command, arguments):
    code, out, _ = command(*arguments, "--help")
    assert code == 0
    assert "exit codes: 0 " in " ".join(out.split())
    assert ("valid" in out.rpartition("exit codes")[2]) == (arguments == ["verify"])


@pytest.mark.parametrize(
    "arguments",
    [[], ["other"], ["info"], ["info", "a", "--what"], ["sample", "a", "--num_images", "0"], ["push", "a"]],
)
def test_unknown_arguments_are_a_usage_error(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "usage: funlora" in err


def test_an_unknown_option_suggests_the_nearest_of_its_command(command):
    code, out, err = command("sample", "run", "--solvr=heun", "--num_image_s", "3")
    assert (code, out) == (2, "")
    assert err.startswith("usage: funlora sample")
    *_, last = err.splitlines()
    assert last.endswith("--solvr=heun --num_image_s 3. Did you mean '--solver'? Did you mean '--num_images'?")
    assert "(choose from" in (error := command("trian")[2])
    assert error.endswith(" Did you mean 'train'?\n")
    assert "'--solver'" not in command("info", "run", "--solvr", "heun")[2]
    assert command("sample", "run", "--steps", "3")[2].endswith("3. Did you mean '--num_inference_steps'?\n")


@pytest.mark.parametrize(
    ("given", "option"),
    [
        (["sample", "run", "--outp", "a.png"], "output"),
        (["info", "run", "--rev", "main"], "revision"),
        (["add", "images", "--to", "run", "--output", "there"], "output_dir"),
        (["evaluate", "run", "--num_samples", "3"], "num_samples_per_class"),
    ],
)
def test_options_have_no_abbreviations(command, given, option):
    code, out, err = command(*given)
    assert (code, out) == (2, "")
    assert err.rstrip().endswith(f"Did you mean '--{option}'?")


@pytest.mark.parametrize(("name", "switch"), [("train", "evaluation"), ("add", "train_omega")])
def test_help_says_what_a_switch_does(command, name, switch):
    text = " ".join(command(name, "--help")[1].split())
    assert f"--no_{switch} Switch off --{switch}." in text


def test_recipes_are_printed_one_a_line_for_scripts(command):
    code, out, err = command("recipes")
    assert (code, err) == (0, "")
    assert out.splitlines() == sorted(
        path.stem for path in (REPOSITORY / "src" / "funlora_hf" / "recipes").glob("*.yaml")
    )
    assert {"digits_2-2", "cifar10_2-2"} <= set(out.split())


def test_warnings_are_lines_in_commands_alone(command, monkeypatch):
    def show(category):
        return warnings.formatwarning("two\n words", category, "file.py", 1, "source")

    before = show(UserWarning)
    monkeypatch.setattr(cli, "recipe_names", lambda: [show(UserWarning).rstrip(), show(FutureWarning).splitlines()[0]])
    assert command("recipes")[1] == "WARNING two words\nfile.py:1: FutureWarning: two\n"
    assert show(UserWarning) == before


def test_version(command):
    assert command("--version")[:2] == (0, f"funlora {funlora_hf.__version__}\n")


IMPORTS = """
import sys
import funlora_hf
before = set(sys.modules)
from funlora_hf.cli import main
for arguments in (["recipes"], ["--version"], ["--help"], ["sample", "--help"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new), file=sys.stderr)
"""


def test_commands_without_a_model_import_no_more_than_the_package():
    done = run_python("-c", IMPORTS)
    assert (done.returncode, done.stderr) == (0, "['funlora_hf']\n")


WITHOUT_THE_PACKAGE = """
import sys
import funlora_command
for word in ("--version", "recipes"):
    sys.argv[1:] = [word]
    assert funlora_command.main() == 0
assert not {"funlora_hf", "torch"} & sys.modules.keys()
"""


def test_version_and_recipes_are_answered_without_the_package_and_the_same(command):
    done = run_python("-c", WITHOUT_THE_PACKAGE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == command("--version")[1] + command("recipes")[1]


def test_ctrl_c_during_the_imports_is_one_line(tmp_path):
    # In the place of torch, which the package imports before anything of its own runs.
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY / "src")])
    done = run_python("-c", "from funlora_command import main; main()", PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by Ctrl-C\n")
    # As a shell has it for what a script starts in its background.
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nos._exit(0)")
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from funlora_command import main; main()"
    assert run_python("-c", ignored, PYTHONPATH=path).returncode == 0


def test_train_and_evaluate_take_their_own_arguments(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = command_line(num_tasks=1, max_train_steps=1, image_quality="none")
    code, out, err = command("train", *few, "--no_evaluation")
    assert code == 0, err
    assert "none yet: `funlora evaluate`" in out
    assert command("train", "--function", "sine")[0].startswith("error: `function` is 'sine'")
    assert command("evaluate", "out", "--number", "3")[0] == 2
    assert "--num_samples_per_class" in command("evaluate", "--help")[1]
    assert "--no_evaluation" not in command("evaluate", "--help")[1]
    code, out, err = command("evaluate", "out", "--num_samples_per_class", "3")
    assert code == 0, err
    assert "LA (%)" in out
    evaluation = read_json(tmp_path / "out" / "results.json")["settings"]["EvaluationArguments"]
    assert (evaluation["num_samples_per_class"], evaluation["num_inference_steps"]) == (3, 2)
    assert evaluation["evaluation"] is True
    code, out, err = command("evaluate", "nowhere")
    assert (code, out) == (1, "")
    assert "error: nowhere holds no run: there is no such folder." in err


def test_info_of_a_run(command, run_folder, tiny_pipe):
    code, out, _ = command("info", run_folder)
    assert code == 0
    base, seven, eight = out.splitlines()
    count = sum(parameter.numel() for parameter in tiny_pipe.unet.parameters())
    assert f"{count:,} parameters" in base
    assert base_fingerprint(tiny_pipe.unet) in base
    assert base.endswith("classes 3 (three), 5")
    assert seven.startswith("adapter adapters/class_7: class 7 (name 7), FUNLORA cosine mul, ")
    assert "class 8 (name 8)" in eight
    assert seven.endswith("base not named (matches)")


def test_info_as_json(command, run_folder, tiny_pipe, tmp_path):
    bank_of(run_folder, run_folder / "bank.safetensors")
    code, out, _ = command("info", run_folder, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["base"]["classes"] == {"3": "three", "5": "5"}
    weights = run_folder / "adapters" / "class_7" / "adapter_model.safetensors"
    adapter = found["adapters"][0]
    assert adapter["num_bytes"] == weights.stat().st_size
    assert (adapter["class_label"], adapter["class_name"], adapter["base_matches"]) == (7, "name 7", True)
    (bank,) = found["banks"]
    assert bank["classes"] == {"17": "from a bank"}
    assert bank["parameters_per_class"] == adapter["parameters"]
    assert bank["base_matches"] is True


def test_info_says_how_far_an_unfinished_run_is(command, run_folder):
    write_json(run_folder / "checkpoints" / "run.json", {"tasks": {"task 1": [3, 5], "task 2": [7, 8]}})
    write_json(run_folder / "checkpoints" / "strategy" / "task_1.safetensors", {})
    code, out, _ = command("info", run_folder)
    assert (code, len(out.splitlines())) == (0, 4)
    assert out.startswith("unfinished run: 1 of 2 tasks are learned. To go on: ")
    assert "--resume_from_checkpoint latest" in out.splitlines()[0]
    # In its first task, it has nothing else yet.
    for name in ("base", "adapters"):
        shutil.rmtree(run_folder / name)
    assert command("info", run_folder)[1] == f"{out.splitlines()[0]}\n"
    assert json.loads(command("info", run_folder, "--json")[1])["unfinished"] == "1 of 2 tasks are learned"
    write_json(run_folder / "results.json", {})
    assert command("info", run_folder)[0] == 1


@pytest.mark.parametrize("place", ["base", "base/unet"])
def test_info_of_a_pipeline_and_of_a_unet(command, run_folder, tiny_pipe, place):
    code, out, _ = command("info", run_folder / place)
    assert code == 0
    assert base_fingerprint(tiny_pipe.unet) in out
    assert len(out.splitlines()) == 1


def test_info_of_one_adapter_and_of_a_bank(command, run_folder, tmp_path):
    code, out, _ = command("info", run_folder, "--subfolder", "adapters/class_8")
    assert (code, len(out.splitlines())) == (0, 1)
    assert out.rstrip().endswith("(not checked)")
    code, out, _ = command("info", bank_of(run_folder, tmp_path / "bank.safetensors"))
    assert code == 0
    assert out.startswith("bank bank.safetensors: FUNLORA cosine mul, ")
    assert out.rstrip().endswith("classes 17 (from a bank)")


def test_names_of_others_fake_no_lines(command, run_folder):
    config = run_folder / "adapters" / "class_7" / "adapter_config.json"
    write_json(config, {**read_json(config), "class_name": "cat\x1b[2J\nadapter class_9: ok", "target_modules": "\n"})
    for name in ("info", "verify", "sample"):
        options = ["--num_inference_steps", "1", "--output", run_folder / "a.png"] if name == "sample" else []
        code, out, _ = command(name, run_folder, *options)
        assert code == 0
        assert "\x1b" not in out
        assert not [line for line in out.splitlines() if line.startswith("adapter class_9")]


def test_info_shows_another_base(command, run_folder, tiny_pipe):
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0] += 1e-3
    tiny_pipe.save_pretrained(run_folder / "base")
    _, out, _ = command("info", run_folder)
    assert out.count("(DOES NOT MATCH)") == 2


def test_sample_draws_what_the_pipeline_does(command, run_folder, tmp_path):
    """Tile by tile, pixel by pixel; classes by id and by name; equal whatever else is drawn."""
    file = tmp_path / "new" / "grid.png"
    arguments = ["sample", run_folder, "--num_images", "3", "--num_inference_steps", "2", "--output", file]
    code, out, _ = command(*arguments, "--classes", "three", "7", "name 8")
    assert (code, out.splitlines()) == (0, ["row 1: 3 (three)", "row 2: 7 (name 7)", "row 3: 8 (name 8)", str(file)])
    grid = pixels(file)
    side = 8 * 8 + 2
    # The names of the rows are on the left.
    assert len(grid) == 3 * side < grid.shape[1]
    grid = grid[:, -3 * side :]
    command(*arguments, "--classes", "8")
    assert np.array_equal(pixels(file)[:, -3 * side :][:, 1:], grid[2 * side :, 1:])
    command(*arguments, "--classes", "8", "--seed", "1")
    assert not np.array_equal(pixels(file)[:, -3 * side :], grid[2 * side :])
    tile = grid[1 : 1 + 64, 1 : 1 + 64]
    assert np.array_equal(tile, tile[::8, ::8].repeat(8, axis=0).repeat(8, axis=1))


def test_sample_refuses_steps_that_a_solver_ignores(fails, run_folder):
    options = ("--solver", "dopri5", "--num_inference_steps", "3")
    assert "`--num_inference_steps` is 3, which `--solver` 'dopri5' ignores" in fails("sample", run_folder, *options)


def test_sample_takes_adapters_and_banks_from_elsewhere(command, run_folder, tmp_path):
    alone = shutil.move(run_folder / "adapters", tmp_path / "alone")
    shutil.copytree(alone, run_folder / "adapters")
    bank = bank_of(run_folder, tmp_path / "bank.safetensors")
    shutil.rmtree(run_folder / "adapters")
    options = ["--num_images", "2", "--solver", "euler", "--num_inference_steps", "1", "--output", tmp_path / "a.png"]
    code, out, _ = command("sample", run_folder / "base", "--adapters", alone, bank, *options)
    assert code == 0
    assert [line.split()[2] for line in out.splitlines()[:-1]] == ["3", "5", "7", "8", "17"]
    grid = pixels(tmp_path / "a.png")
    assert len(grid) == 5 * 66
    # Class 17 is class 7 by another name, from other noise.
    assert not np.array_equal(grid[2 * 66 : 3 * 66], grid[4 * 66 :])


def test_sample_shows_classes_of_one_id_or_name_side_by_side(command, run_folder, tiny_pipe, tmp_path):
    write_adapters(tiny_pipe, tmp_path / "a", classes=[7], base=False, class_label=7, class_name="cat")
    write_adapters(tiny_pipe, tmp_path / "b", classes=[9], base=False, class_label=9, class_name="name 8")
    sources = [tmp_path / "a" / "adapters", tmp_path / "b" / "adapters"]
    how = ("--num_images", "1", "--num_inference_steps", "1", "--output", tmp_path / "a.png")
    code, out, err = command("sample", run_folder, "--adapters", *sources, *how)
    assert code == 0
    assert out.splitlines()[4:6] == [f"row 5: 9 (cat of {sources[0]})", f"row 6: 10 (name 8 of {sources[1]})"]
    assert f"class 7 (cat) of {sources[0]} is 9 (cat of {sources[0]}) here, since another class has its id or" in err


def test_sample_of_a_saved_pipeline_loads_its_adapters_once(command, run_folder, tmp_path):
    pipe = FunLoraPipeline.from_pretrained(run_folder / "base")
    pipe.load_adapter(run_folder / "adapters" / "class_7")
    pipe.save_pretrained(tmp_path / "saved")
    code, out, _ = command("sample", tmp_path / "saved", "--num_inference_steps", "1", "--output", tmp_path / "a.png")
    assert code == 0
    assert "row 3: 7 (name 7)" in out


def test_sample_says_what_is_wrong(fails, run_folder, tmp_path):
    assert "`--classes` has 'cat', expected ids or names of: 3 (three), 5, 7 (name 7), 8 (name 8)" in fails(
        "sample", run_folder, "--classes", "7", "cat"
    )
    assert "holds no pipeline" in fails("sample", run_folder / "adapters")
    assert "`--device` is 'cuda:99'" in fails("sample", run_folder, "--device", "cuda:99")
    assert "`--output` is" in fails("sample", run_folder, "--output", tmp_path / "a.txt")
    assert "expected a name ending in .png" in fails(
        "sample", run_folder, "--classes", "7", "--num_inference_steps", "1", "--output", tmp_path / "a.jpg"
    )
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails(
        "sample", run_folder, "--classes", "7", "--num_inference_steps", "1", "--output", tmp_path / "file" / "a.png"
    )


def test_sample_of_a_class_named_like_another_s_id(command, fails, run_folder, tiny_pipe, tmp_path):
    write_adapters(tiny_pipe, run_folder, classes=[12], base=False, class_label=12, class_name="7")
    assert (
        "`--classes` has '7', the id of class 7 (name 7) and the name of class 12: pass --class_label 7, or --class_name 7"
        in fails("sample", run_folder, "--classes", "7")
    )
    how = ("--num_images", "1", "--num_inference_steps", "1", "--output", tmp_path / "a.png")
    code, out, _ = command("sample", run_folder, "--class_name", "7", "three", "--class_label", "7", *how)
    assert code == 0
    assert out.splitlines()[:3] == ["row 1: 7 (name 7)", "row 2: 12 (7)", "row 3: 3 (three)"]
    assert "`--class_name` has '8', expected names of" in fails("sample", run_folder, "--class_name", "8")
    assert "`--class_label` has '9', expected ids of" in fails("sample", run_folder, "--class_label", "9")


def test_sample_of_an_adapter_of_another_base(fails, run_folder, tiny_pipe):
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0] += 1e-3
    tiny_pipe.save_pretrained(run_folder / "base")
    assert "was trained for another base" in fails("sample", run_folder)


@pytest.mark.parametrize("name", ["info", "sample", "verify"])
def test_a_missing_folder_and_repository(fails, hub, tmp_path, name):
    assert "is neither a folder that is there nor the name of a repository" in fails(name, tmp_path / "nowhere")
    assert "is neither a folder that is there nor a repository that you may read" in fails(name, "user/nothing")


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "digts"],
        ["verify", "runs/digts"],
        ["sample", "digts"],
        ["pull", "digts", "there"],
        ["push", "digts", REPO],
    ],
)
def test_a_mistyped_folder_never_asks_the_hub(fails, hub, run_folder, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_folder, "digits")
    shutil.copytree(run_folder, "runs/digits")
    before = len(hub.requests)
    error = fails(*arguments)
    assert len(hub.requests) == before
    assert f"nothing here has this name; did you mean '{arguments[1].replace('digts', 'digits')}'?" in error
    assert not (tmp_path / "there").exists()


def test_a_repository_with_a_name_almost_like_a_folder_s(command, hub, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_folder, "user/digitz")
    assert command("push", run_folder, REPO)[0] == 0
    # The repository alone is looked at, though there is a folder of its name now.
    shutil.copytree(run_folder / "adapters", "user/digits")
    assert "already has everything" in command("push", run_folder, REPO)[1]
    shutil.rmtree("user/digits")
    assert command("info", REPO)[0] == 1
    assert "class 8 (name 8)" in command("info", REPO, "--revision", "main")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "~nobody-here/run"],
        ["sample", "run", "--output=~nobody-here/a.png"],
        ["pull", "run", "~nobody-here/run"],
        ["train", "--output_dir=~nobody-here/run"],
        ["train", "--base_model", "~nobody-here/run"],
        ["train", "--dataset_name", "~nobody-here/run"],
        ["train", "--joint_results", "~nobody-here/run"],
        ["add", "~nobody-here/run", "--to", "digits"],
        ["add", "digits", "--to", "digits", "--output_dir=~nobody-here/run"],
    ],
)
def test_a_path_of_no_user_is_refused(command, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert out == ""
    assert "~nobody-here/" in (text := code if isinstance(code, str) else err)
    assert "but there is no such user: write the full path." in text.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_shell_s_leftover_tilde_is_the_user_s_folder(command, run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    how = ("--num_images", "1", "--num_inference_steps", "1", "--classes", "7")
    assert command("sample", run_folder, *how, "--output=~/a.png")[0] == 0
    assert (tmp_path / "a.png").is_file()
    assert short_run(output_dir="~/out").training.output_dir == str(tmp_path / "out")


def test_info_of_a_folder_of_runs_names_them(fails, tmp_path):
    for name in ("b", "a"):
        write_json(tmp_path / name / "checkpoints" / "run.json", {})
    assert f"There are runs in it: {tmp_path / 'a'}, {tmp_path / 'b'}." in fails("info", tmp_path)


def test_info_of_a_damaged_adapter(fails, run_folder):
    damage(run_folder)
    assert "class_7/adapter_config.json' is not a valid JSON file" in fails("info", run_folder)


def test_verify(command, run_folder, tiny_pipe):
    code, out, _ = command("verify", run_folder)
    assert code == 0
    assert out.splitlines() == [
        f"base base: ok, fingerprint {base_fingerprint(tiny_pipe.unet)}",
        "adapter adapters/class_7: ok, made for this base",
        "adapter adapters/class_8: ok, made for this base",
    ]
    damage(run_folder)
    code, out, _ = command("verify", run_folder)
    assert code == 1
    assert out.splitlines()[1].startswith("adapter adapters/class_7: FAILED: ")
    assert out.splitlines()[2] == "adapter adapters/class_8: ok, made for this base"
    code, out, _ = command("verify", run_folder, "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (1, False)
    assert [verdict["ok"] for verdict in found["verdicts"]] == [True, False, True]


def test_verify_against_another_base(command, run_folder, tiny_pipe, tmp_path):
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0] += 1e-3
    tiny_pipe.save_pretrained(tmp_path / "other")
    code, out, _ = command("verify", run_folder / "adapters", "--base", tmp_path / "other")
    assert code == 1
    assert out.count("FAILED: The adapter") == out.count("was trained for another base") == 2


def test_push_and_pull_give_the_run_back(command, hub, run_folder, tmp_path):
    code, out, _ = command("push", run_folder, REPO, "--license", "mit")
    assert code == 0
    assert len(out.splitlines()) >= 2
    assert all(f"{REPO}" in line and "/commit/" in line for line in out.splitlines())
    assert "license: mit" in hub.files(REPO)["README.md"].decode()
    code, out, _ = command("push", run_folder, REPO, "--license", "mit")
    assert (code, out) == (0, f"{REPO} already has everything: no commit was made.\n")
    there = tmp_path / "there"
    assert command("pull", REPO, there)[0] == 0
    assert command("pull", REPO, there, "--with_base")[0] == 0
    assert {path.name for path in there.iterdir()} == {"base", "adapters"}
    assert digests(there / "base") == digests(run_folder / "base")
    for label in (7, 8):
        weights = Path("adapters") / f"class_{label}" / "adapter_model.safetensors"
        assert (there / weights).read_bytes() == (run_folder / weights).read_bytes()
    code, out, _ = command("verify", there)
    assert (code, out.count("made for this base")) == (0, 2)


def test_push_private_with_its_base_elsewhere(command, hub, run_folder):
    command("push", run_folder, "user/base")
    assert command("push", run_folder, REPO, "--private", "--base_model", "user/base")[0] == 0
    assert "model_index.json" not in hub.files(REPO)
    assert json.loads(hub.files(REPO)["class_7/adapter_config.json"])["base_model_name_or_path"] == "user/base"


def test_pull_takes_the_classes_asked_for_and_nothing_else(command, hub, run_folder, tmp_path):
    command("push", run_folder, REPO)
    hub.commit(REPO, {"class_8/evil.py": b"x", "class_8/samples.png": b"png", "unet/model.bin": b"x"})
    there = tmp_path / "there"
    asked = len(hub.requests)
    code, out, _ = command("pull", REPO, there, "--classes", "8")
    assert (code, out) == (0, f"{there / 'adapters' / 'class_8'}\n")
    assert not any("class_7" in path or "unet" in path for _, path in hub.requests[asked:])
    assert sorted(digests(there)) == [
        f"adapters/class_8/{name}"
        for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "samples.png")
    ]
    command("pull", REPO, there, "--with_base")
    assert not [name for name in digests(there) if name.endswith((".py", ".bin"))]
    before = digests(there)
    assert command("pull", REPO, there)[:2] == (0, f"{there} already has everything: nothing was written.\n")
    assert digests(there) == before


def test_pull_overwrites_only_when_told(command, fails, hub, run_folder, tmp_path):
    command("push", run_folder, REPO)
    there = tmp_path / "there"
    command("pull", REPO, there, "--classes", "8")
    card = there / "adapters" / "class_8" / "README.md"
    card.write_text("mine")
    before = digests(there)
    error = fails("pull", REPO, there)
    assert "class_8: exists already, with different content" in error
    assert "--overwrite" in error
    assert digests(there) == before
    code, out, _ = command("pull", REPO, there, "--overwrite")
    assert (code, len(out.splitlines())) == (0, 2)
    assert card.read_text() != "mine"


def test_pull_writes_nothing_that_is_unsound(command, fails, hub, run_folder, tmp_path):
    command("push", run_folder, REPO)
    there = tmp_path / "there"
    weights = hub.files(REPO)["class_8/adapter_model.safetensors"]
    hub.commit(REPO, {"class_8/adapter_model.safetensors": weights[:-4]})
    assert "'class_8' of 'user/digits'" in fails("pull", REPO, there)
    assert not there.exists()
    assert command("pull", REPO, there, "--classes", "7")[0] == 0
    assert "has no class_9, expected class_7, class_8" in fails(
        "pull", run_folder, tmp_path / "local", "--classes", "9"
    )
    assert "has no class_9" in fails("pull", REPO, there, "--classes", "9")
    assert "has no base" in fails("pull", run_folder / "adapters", tmp_path / "local", "--with_base")


def test_pull_to_a_run_of_another_base(command, fails, hub, run_folder, tiny_pipe, tmp_path):
    command("push", run_folder, REPO)
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0] += 1e-3
    tiny_pipe.save_pretrained(tmp_path / "there" / "base")
    before = digests(tmp_path / "there")
    assert "was trained for another base" in fails("pull", REPO, tmp_path / "there")
    assert "exists already, with different content" in fails("pull", REPO, tmp_path / "there", "--with_base")
    assert digests(tmp_path / "there") == before


def test_pull_of_an_adapter_that_says_it_is_another(fails, run_folder, tmp_path):
    config = run_folder / "adapters" / "class_7" / "adapter_config.json"
    write_json(config, {**read_json(config), "class_label": 8})
    assert "its folder is 'class_7', but its config says class 8" in fails("pull", run_folder, tmp_path / "there")
    own = shutil.move(config.parent, tmp_path / "seven")
    assert "is of class 8, which is not in [7]" in fails("pull", own, tmp_path / "there", "--classes", "7")
    assert not (tmp_path / "there").exists()


def test_pull_to_a_place_that_cannot_be_written(fails, run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails("pull", run_folder, tmp_path / "file" / "there")
    assert (tmp_path / "file").read_text() == ""


def test_push_says_what_is_wrong(fails, hub, run_folder, tmp_path):
    assert "expected the folder of a run" in fails("push", tmp_path / "nowhere", REPO)
    hub.fail(status=403, path="/api/repos/create")
    assert "403" in fails("push", run_folder, REPO)
    hub.clear_faults()
    damage(run_folder)
    assert "is not a valid JSON file" in fails("push", run_folder, REPO)
    assert not hub.repos()


def test_delete_takes_a_class_out_of_folder_and_repository(command, fails, hub, run_folder):
    command("push", str(run_folder), "user/digits")
    places = ("--output_dir", str(run_folder), "--repo_id", "user/digits")
    assert "`CLASS` has 'cat', expected ids or names of: 7 (name 7), 8 (name 8)" in fails("delete", "cat", *places)
    assert "expected a place to delete the class from" in fails("delete", "name 7")
    assert f"Did you mean --output_dir {run_folder}?" in command("delete", "7", run_folder)[2]
    code, output, _ = command("delete", "name 7", *places)
    assert (code, output.splitlines()[0]) == (0, "deleted class 7 (name 7) from user/digits")
    assert not (run_folder / "adapters" / "class_7").exists()
    assert not any(name.startswith("class_7") for name in hub.files("user/digits"))
    assert "`class_label` is 7, which none of the given places has" in fails("delete", "7", *places)
    damage(run_folder, 8)
    assert command("delete", "8", *places[:2])[:2] == (0, f"deleted class 8 from {run_folder}\n")


def test_a_hub_that_does_not_answer(run_folder, hub, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = run_module("push", str(run_folder), REPO, HF_ENDPOINT=endpoint, **home(hub, tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: the Hub at {endpoint} does not answer (" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 5])
def test_pull_stops_at_a_signal_with_nothing_half_written(command, hub, run_folder, tmp_path, monkeypatch, number, at):
    command("push", run_folder, REPO)
    command("pull", REPO, tmp_path / "whole", "--with_base")
    copied = []

    def copy(source, target, real=shutil.copyfile):
        copied.append(target)
        real(source, target)
        if len(copied) == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(shutil, "copyfile", copy)
    code, out, err = command("pull", REPO, tmp_path / "there", "--with_base")
    assert (code, out, len(copied)) == (128 + number, "", at)
    assert err == f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}; the same command goes on\n"
    assert digests(tmp_path / "there").items() < (expected := digests(tmp_path / "whole")).items()
    assert command("pull", REPO, tmp_path / "there", "--with_base")[0] == 0
    assert digests(tmp_path / "there") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("made", [0, 1])
def test_push_stops_at_a_signal_and_goes_on(command, hub, run_folder, monkeypatch, number, made):
    """Before its first commit, and between that and its tag."""

    def commit(*arguments, real=HfApi.create_commit, **options):
        if made:
            real(*arguments, **options)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", commit)
        code, out, err = command("push", run_folder, REPO)
    assert (code, out) == (128 + number, "")
    assert err == f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}; the same command goes on\n"
    assert (len(hub.commits(REPO)), len(hub.tags(REPO))) == (1 + made, 0)
    assert command("push", run_folder, REPO)[0] == 0
    assert (len(hub.commits(REPO)), len(hub.tags(REPO))) == (3, 3)
    assert command("verify", REPO)[0] == 0


def test_in_a_process_of_its_own_from_the_hub(hub, run_folder, command, tmp_path):
    """Only results on stdout, which a script reads."""
    command("push", run_folder, REPO)
    done = run_module("verify", REPO, "--json", **home(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert [verdict["name"] for verdict in json.loads(done.stdout)["verdicts"]] == [REPO, "class_7", "class_8"]
    assert "%|" not in done.stderr


def home(hub, tmp_path):
    return {name: value for name, value in hub.environment.items() if name != "HF_ENDPOINT"} | {
        "HF_HOME": str(tmp_path / "home")
    }


def run_module(*arguments, **environment):
    return run_python("-m", "funlora_hf", *arguments, **environment)


def run_python(*arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src"), **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
