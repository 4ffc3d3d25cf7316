"""What commands say of concepts: info, verify, and those that are for classes only."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from learned_concepts import learn, make_strategy
from safetensors.torch import load_file, save_file

from funlora_hf.cli import main
from funlora_hf.personalization.run_folder import ConceptFolder
from funlora_hf.utils.files import file_sha256, write_json


@pytest.fixture
def command(capsys):
    def start(*arguments):
        code = main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return start


def test_info(command, learned, base):
    code, out, err = command("info", learned)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith("concept concepts/t1: <t1> b, funlora (FUNLORA cosine mul), ")
    assert first.endswith(f"base {base}; prompt: a <t1> b")
    assert second.startswith("concept concepts/t2: <t2> b, ")
    folder = learned / "concepts" / "t2"
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    numbers = sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
    assert f"{numbers:,} numbers, {sum(sizes):,} bytes" in second
    (described,) = json.loads(command("info", folder, "--json")[1])["concepts"]
    assert described["place"] == str(folder)
    assert (described["parameters"], described["num_bytes"], described["in_model"]) == (numbers, sum(sizes), False)
    assert command("info", learned, "--subfolder", "concepts/t1")[1].count("\n") == 1


def test_info_of_a_run_that_has_not_ended(command, learned, tmp_path):
    settings = {"ConceptArguments": {}, "tasks": {"task 1": [0], "task 2": [1]}}
    write_json(ConceptFolder(tmp_path).checkpoints / "run.json", settings)
    expected = "unfinished run: 0 of 2 tasks are learned. To go on: the `funlora personalize` command that began it"
    assert command("info", tmp_path)[1].startswith(expected)
    shutil.copytree(learned / "concepts" / "t1", tmp_path / "concepts" / "t1")
    out = command("info", tmp_path)[1].splitlines()
    assert (out[0].startswith(expected), len(out)) == (True, 2)


def test_verify(command, learned, base):
    code, out, _ = command("verify", learned)
    assert (code, out) == (
        0,
        "concept concepts/t1: ok, token <t1>, base not checked\nconcept concepts/t2: ok, token <t2>, base not checked\n",
    )
    assert "concepts/t1: ok, token <t1>, made for this base" in command("verify", learned, "--base", base)[1]
    code, out, _ = command("verify", learned, "--base", "tiny", "--json")
    assert code == 1
    assert [verdict["ok"] for verdict in json.loads(out)["verdicts"]] == [False, False]


def put_nan(file):
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file)


def renewed(folder, name):
    """Change a file and its hash."""
    put_nan(folder / name)
    about = json.loads((folder / "concept.json").read_text())
    about["weights"][name] = file_sha256(folder / name)
    (folder / "concept.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: put_nan(f / "adapter_model.safetensors"), "its SHA-256 differs from that in concept.json"),
        (lambda f: renewed(f, "adapter_model.safetensors"), "NaN"),
        (lambda f: renewed(f, "learned_embeds.safetensors"), "NaN"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model.safetensors"),
    ],
)
def test_verify_names_damage_and_goes_on(command, learned, damage, message, tmp_path):
    run = shutil.copytree(learned, tmp_path / "run")
    damage(run / "concepts" / "t1")
    code, out, _ = command("verify", run)
    first, second = out.splitlines()
    assert (code, first.partition(": F")[0]) == (1, "concept concepts/t1")
    assert message in first
    assert second.endswith("base not checked")


def test_the_pipeline_of_a_run_is_checked(command, base, tmp_path):
    run = learn(make_strategy(tmp_path, "naive_lora", base=base, names=["t1"]))
    assert "in the run's own pipeline" in command("info", run)[1]
    assert command("verify", run)[1].splitlines()[-1] == "model model: ok, it knows <t1>"
    put_nan(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert command("verify", run)[0] == 1
    shutil.rmtree(run / "model")
    assert "has no model/model_index.json" in command("verify", run)[1]


@pytest.mark.parametrize(
    "arguments",
    [["pull", "RUN", "there"], ["evaluate", "RUN"], ["sample", "RUN"]],
)
def test_commands_for_classes_refuse_concepts_by_name(command, arguments, learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*(str(learned) if one == "RUN" else one for one in arguments))
    assert code == 1
    assert "has concepts of a text-to-image model (t1, t2), expected classes" in err
    assert not list(tmp_path.iterdir())
