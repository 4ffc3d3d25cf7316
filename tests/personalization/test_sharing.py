"""Concepts on the Hub and deleted, and images drawn of prompts: by the commands."""

from __future__ import annotations

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from concept_runs import run as personalize
from huggingface_hub.errors import HfHubHTTPError
from learned_concepts import learn, make_strategy, save_base
from text_encoders import PIPELINES

from funlora_hf import push_all
from funlora_hf.cli import main
from funlora_hf.personalization.arguments import ConceptEvaluationArguments
from funlora_hf.personalization.drawing import draw
from funlora_hf.personalization.load_concept import load_concept
from funlora_hf.personalization.sampling import sample_prompts
from funlora_hf.text_to_image.model import TextToImageModel
from funlora_hf.utils.files import write_json


REPO = "user/things"


@pytest.fixture(scope="module")
def in_model(base, tmp_path_factory):
    return learn(make_strategy(tmp_path_factory.mktemp("merged"), "naive_lora", base=base))


@pytest.fixture
def command(capsys):
    def start(*arguments):
        code = main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return start


def drawn(pipe, prompt):
    """As `sample_prompts` draws two images with two steps."""
    config = ConceptEvaluationArguments(num_inference_steps=2)
    return draw(pipe, [prompt], 2, purpose="funlora sample", seed=0, resolution=8, config=config)


def image(pipe, prompt):
    return pipe(prompt, num_inference_steps=1, output_type="pt", generator=torch.manual_seed(3)).images


def test_push_and_load_from_the_hub(command, hub, learned, base):
    code, out, _ = command("push", learned, REPO, "--base_model", "user/base", "--license", "mit")
    assert (code, out.count("/commit/")) == (0, 1)
    files = hub.files(REPO)
    assert {name for name in files if name.startswith("t1/")} == {
        f"t1/{path.name}" for path in (learned / "concepts" / "t1").iterdir()
    }
    assert not [name for name, content in files.items() if str(base).encode() in content]
    assert json.loads(files["t1/concept.json"])["base_model_name_or_path"] == "user/base"
    card = files["README.md"].decode()
    assert "| t1 | \\<t1\\> | b | funlora |" in card
    assert 'load_concept(pipe, "user/things", subfolder="t1")' in card
    assert "license: mit" in card
    local, remote = (TextToImageModel.from_pretrained(base).pipeline() for _ in range(2))
    load_concept(local, learned / "concepts" / "t2")
    assert load_concept(remote, REPO, subfolder="t2") == "<t2>"
    assert torch.equal(image(remote, "a <t2> b"), image(local, "a <t2> b"))
    assert command("info", REPO)[1].startswith("concept t1: <t1> b, funlora (FUNLORA cosine mul), ")
    assert command("verify", REPO, "--base", base)[1].count("made for this base") == 2
    assert "no commit was made" in command("push", learned, REPO, "--base_model", "user/base")[1]
    code, out, _ = command("delete", "t1", "--repo_id", REPO)
    assert (code, out) == (0, f"deleted concept t1 from {REPO}\n")
    assert not [name for name in hub.files(REPO) if name.startswith("t1/")]
    card = hub.files(REPO)["README.md"].decode()
    assert ("| t1 |" in card, "| t2 |" in card, "license: mit" in card) == (False, True, True)


@pytest.mark.parametrize("family", [family for family in PIPELINES if family != "sd"])
def test_other_families(family, command, hub, tmp_path):
    """Pushed, loaded from the Hub and drawn by its command, as the run's strategy draws."""
    base = save_base(tmp_path / "base", family)
    strategy = make_strategy(tmp_path / "run", base=base, family=family, resolution=8)
    run = learn(strategy)
    assert command("push", run, REPO, "--base_model", "user/base")[0] == 0
    own = {f"t1/{path.name}": path.read_bytes() for path in (run / "concepts/t1").glob("*.safetensors")}
    rows = ["learned_embeds.safetensors", "learned_embeds_2.safetensors"][: 1 if family == "pixart" else 2]
    assert own.keys() == {f"t1/{name}" for name in ("adapter_model.safetensors", *rows)}
    assert own.items() <= hub.files(REPO).items()
    card = hub.files(REPO)["t1/README.md"].decode()
    assert ("pipe(**prompt_arguments(pipe, prompt))" in card) == (family in ("sd3", "pixart"))
    assert command("verify", REPO, "--base", base)[1].count("made for this base") == 2
    prompts, how = ["a <t1> b", "a b"], ["--num_images", 2, "--num_inference_steps", 2, "--output", tmp_path / "a.png"]
    code, out, _ = command("sample", run, *(f"--prompt={prompt}" for prompt in prompts), *how)
    assert (code, out.splitlines()[:2]) == (
        0,
        ["row 1: a <t1> b: concept t1", "row 2: a b: no concept, the base"],
    )
    rows = sample_prompts(run, prompts, num_images=2, num_inference_steps=2)
    remote = TextToImageModel.from_pretrained(base).pipeline()
    load_concept(remote, REPO, subfolder="t1")
    for row, class_ids in zip(rows, ([0], []), strict=True):
        with strategy.sampling(*class_ids) as pipe:
            assert torch.equal(row.images, drawn(pipe, row.prompt))
    assert torch.equal(rows[0].images, drawn(remote, "a <t1> b"))


def test_nothing_is_pushed_of_a_damaged_run(command, hub, learned, tmp_path):
    run = shutil.copytree(learned, tmp_path / "run")
    with open(run / "concepts" / "t2" / "learned_embeds.safetensors", "ab") as file:
        file.write(b"x")
    code, _, err = command("push", run, REPO)
    assert code == 1
    assert "t2" in err
    assert hub.repos() == []


def test_a_hub_that_fails_leaves_nothing(command, hub, learned, waits):
    hub.fail(method="POST", path="/commit/", status=403, times=None)
    assert command("push", learned, REPO, "--base_model", "user/base")[0] == 1
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_classes_and_concepts_do_not_share_a_repository(command, hub, learned, run_folder):
    hub.commit(REPO, {"classes.json": b"{}"})
    assert "which has classes: push concepts to another" in command("push", learned, REPO)[2]
    hub.commit("user/concepts", {"t1/concept.json": b"{}"})
    with pytest.raises(ValueError, match="'user/concepts' has concepts of a text-to-image model"):
        push_all(run_folder, "user/concepts")
    assert "has concepts of a text-to-image model" in command("push", run_folder, "user/concepts")[2]


def test_the_pipeline_of_a_run_is_pushed_with_its_concepts(command, hub, in_model, learned):
    assert command("push", in_model, REPO)[0] == 0
    pipe = TextToImageModel.from_pretrained(REPO).pipeline()
    own = TextToImageModel.from_pretrained(in_model / "model").pipeline()
    assert torch.equal(image(pipe, "a <t1> b"), image(own, "a <t1> b"))
    assert command("verify", REPO)[1].splitlines()[-1] == "model model: ok, it knows <t1>, <t2>"
    assert "cannot be deleted alone" in command("delete", "t1", "--repo_id", REPO)[2]
    assert 'DiffusionPipeline.from_pretrained("user/things")' in hub.files(REPO)["t1/README.md"].decode()
    hub.commit(REPO, {"other/concept.json": hub.files(REPO)["t1/concept.json"]})
    assert "need a repository of their own" in command("push", learned, REPO)[2]


def test_delete_from_a_run(command, learned, tmp_path):
    run = shutil.copytree(learned, tmp_path / "run")
    write_json(run / "results.json", {"concepts": ["t1", "t2"]})
    own = [
        "concepts/t2",
        "figures/samples_task_2.png",
        "checkpoints/concept_t2",
        "checkpoints/evaluation/task_2/t2.json",
    ]
    others = ["concepts/t1", "figures/samples_task_1.png", "checkpoints/evaluation/task_2/t20.json", "results.json"]
    for name in (*own, *others):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.suffix:
            path.mkdir(exist_ok=True)
        elif not path.exists():
            path.write_text("{}")
    assert "expected a concept that is there: t1, t2" in command("delete", "t3", "--output_dir", run)[2]
    assert command("delete", "t2", "--output_dir", run)[:2] == (0, f"deleted concept t2 from {run}\n")
    assert [(run / name).exists() for name in own] == [False] * len(own)
    assert [(run / name).exists() for name in others] == [True] * len(others)


def test_what_all_concepts_share_is_not_deleted(command, in_model):
    code, _, err = command("delete", "t1", "--output_dir", in_model)
    assert (code, (in_model / "concepts" / "t1").is_dir()) == (1, True)
    assert "in the weights of its pipeline, as all its concepts" in err


def test_sample(command, learned, base, tmp_path):
    file = tmp_path / "a.png"
    prompts = ["a <t1> b", "a <T2> b", "a <t1> <t2>", "a b"]
    options = [part for prompt in prompts for part in ("--prompt", prompt)]
    code, out, _ = command(
        "sample", learned, *options, "--num_images", 2, "--num_inference_steps", 2, "--output", file
    )
    assert (code, out.splitlines()) == (
        0,
        [
            "row 1: a <t1> b: concept t1",
            "row 2: a <T2> b: concept t2",
            "row 3: a <t1> <t2>: concepts t1, t2, 2 adapters active together",
            "row 4: a b: no concept, the base",
            str(file),
        ],
    )
    assert np.asarray(PIL.Image.open(file)).std() > 0


def test_rows_are_those_of_the_strategy_and_of_the_base(learned, base):
    """Whatever other prompts are drawn; two adapters together are neither alone."""
    how = {"num_images": 2, "num_inference_steps": 2}
    one, both, none = sample_prompts(learned, ["a <t1> b", "a <t1> <t2>", "a b"], **how)
    (alone,) = sample_prompts(learned, ["a <t1> b"], **how)
    assert torch.equal(one.images, alone.images)
    strategy = make_strategy(learned, base=base)

    def by_strategy(class_ids, prompt):
        with strategy.sampling(*class_ids) as pipe:
            return drawn(pipe, prompt)

    assert torch.equal(one.images, by_strategy([0], "a <t1> b"))
    assert torch.equal(none.images, by_strategy([], "a b"))
    assert not any(torch.equal(both.images, by_strategy([class_id], "a <t1> <t2>")) for class_id in (0, 1))


def test_sample_from_the_pipeline_of_a_run(in_model):
    (row,) = sample_prompts(in_model, ["a <t2> b"], num_images=1, num_inference_steps=1)
    assert (row.concepts, row.adapters) == (["t2"], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a <t9> b"], "has <t9>, expected tokens of these concepts: <t1>, <t2>"),
        (["--prompt", "a <t1> b b b b b b b"], "expected at most 8: shorten it"),
        (["--prompt", "a <t1> b", "--classes", "3"], "`--classes` is ['3'], but `--prompt` draws concepts"),
        (["--prompt", "a <t1> b", "--guidance_scale", "0"], "`guidance_scale` is 0"),
        (["--width", "64"], "`--width` is 64, which only `--prompt` uses"),
        ([], 'and `sample --prompt "..."`'),
    ],
)
def test_bad_samples_are_refused(command, learned, options, message, tmp_path):
    code, _, err = command("sample", learned, *options, "--output", tmp_path / "a.png")
    assert code == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def messages(hub):
    return [commit.message for commit in reversed(hub.commits(REPO)[:-1])]


PUSHED = {"push_to_hub": True, "hub_model_id": REPO, "hub_license": "mit", "evaluation": False}


def test_a_run_pushes_itself(hub, inputs, fresh_accelerator, tmp_path):
    """A tagged commit after each task; Hub errors stop no training, and what was missed is in the next commit."""
    personalize(inputs, tmp_path / "run", **PUSHED)
    assert messages(hub) == ["Task 1: concept b0", "Task 2: concept c1"]
    assert set(hub.tags(REPO)) == {"task-1", "task-2"}
    files = hub.files(REPO)
    for name in ("b0", "c1"):
        for path in (tmp_path / "run/concepts" / name).glob("*.safetensors"):
            assert files[f"{name}/{path.name}"] == path.read_bytes()
    assert b"license: mit" in files["README.md"]
    personalize(inputs, tmp_path / "run", **PUSHED, resume_from_checkpoint="latest")
    assert len(messages(hub)) == 2


def test_a_hub_that_fails_stops_no_run(hub, inputs, fresh_accelerator, tmp_path, waits, caplog):
    hub.fail(method="POST", path="/commit/", status=403, times=1)
    personalize(inputs, tmp_path / "run", **PUSHED)
    assert "Task 1 was not pushed to user/things, the next push includes it" in caplog.text
    assert messages(hub) == ["Task 2: concept c1"]
    assert {"b0/concept.json", "c1/concept.json"} <= hub.files(REPO).keys()


def test_a_pipeline_of_all_concepts_is_pushed_at_the_end(hub, inputs, fresh_accelerator, tmp_path):
    personalize(inputs, tmp_path / "run", **PUSHED, strategy="naive_lora")
    assert messages(hub) == ["Task 2: concept c1"]
    assert {"model_index.json", "b0/concept.json", "c1/concept.json"} <= hub.files(REPO).keys()


def test_a_token_that_may_not_write_is_found_before_training(hub, inputs, fresh_accelerator, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    with pytest.raises(HfHubHTTPError):
        personalize(inputs, tmp_path / "run", **PUSHED)
    assert not (tmp_path / "run/concepts").exists()
