"""`funlora personalize`: a short run of the package's own base, and errors of one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from concept_runs import drawn
from concept_strategies import ALL, write_pictures
from diffusers import StableDiffusionPipeline

from funlora_hf.personalization.arguments import ConceptEvaluationArguments
from funlora_hf.personalization.command import main
from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.drawing import draw
from funlora_hf.personalization.load_concept import load_concept
from funlora_hf.personalization.strategies.registry import concept_strategy
from funlora_hf.personalization.tiny import tiny_base
from funlora_hf.sampling.drawing import tensor_sha256


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SHORT = [
    "--max_train_steps",
    "2",
    "--num_samples_per_prompt",
    "1",
    "--num_inference_steps",
    "1",
    "--concept_order",
    "toy1",
    "badge1",
]


def test_the_tiny_base(tmp_path, capsys, recwarn):
    main([*SHORT, "--output_dir", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    # The log is on another handler.
    assert (err, [str(one.message) for one in recwarn if one.category is not DeprecationWarning]) == ("", [])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {"attr", "sim", "clip_i", "clip_t", "leak"} <= results["scores"].keys()
    assert results["ceiling"]["attr"] == 1.0
    assert results["base_drift"]["before"].keys() >= {"shape", "colour", "size", "background"}
    assert "| attr | " in out
    assert "first samples at the end: identical to the bit" in out


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--concept_ordr", "toy1"], "--concept_order"),
        (["--concepts", "nowhere.json"], "there is no such file or folder"),
        (["--strategy", "cns", "--strategy_options", "overlap=excluded"], "overlap=excluded, since earlier concepts"),
        (["--rank", "0"], "`rank` should be a positive integer value but the value passed is 0"),
    ],
)
def test_errors(given, error, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*given, "--output_dir", str(tmp_path / "run")])
    text = f"{exit.value.code}{capsys.readouterr().err}"
    assert error in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ALL)
def test_every_strategy_from_start_to_end(strategy, tmp_path):
    """Stock diffusers draws what the run drew, to the bit."""
    folder = tmp_path / "run"
    main([*SHORT, "--strategy", strategy, "--output_dir", str(folder)])
    results = json.loads((folder / "results.json").read_text())
    assert {"attr", "sim", "clip_i", "clip_t", "leak"} <= results["scores"].keys()
    assert {(*one,) for one in results["scores"].values()} == {("matrix", "own", "end", "forgetting", "drop")}
    in_model = (folder / "model").is_dir()
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model" if in_model else tiny_base())
    pipe.set_progress_bar_config(disable=True)
    sampling = {"config": ConceptEvaluationArguments(num_inference_steps=1), "seed": 0, "resolution": 32}
    changes = results["zero_forgetting"]["identical"] is None
    concepts = load_concepts("tiny")[:2]
    # A saved pipeline has no layer-wise rows.
    loaded = [] if in_model and not concept_strategy(strategy).layerwise else [one.name for one in concepts]
    for number, concept in enumerate(concepts, start=1):
        while loaded and (changes or concept.name in loaded):
            load_concept(pipe, folder / "concepts" / loaded.pop(0))
        images = draw(pipe, [concept.prompt(concept.eval_prompts[0])], 1, purpose=concept.name, **sampling)
        assert tensor_sha256(images) == drawn(folder, concept.name, 2 if changes else number)


TOY, FLAG = (
    {"instance_prompt": f"a photo of a {token} {noun}", "instance_data_dir": noun, "eval_prompts": ["a {}"]}
    for token, noun in (("<new1>", "toy"), ("<new2>", "flag"))
)


def tiny_with(folder: Path, file: str, **changes) -> str:
    """The tiny base, but for a few values of one of its files."""
    base = shutil.copytree(tiny_base(), folder / "base")
    (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **changes}))
    return str(base)


BAD_INPUT = {
    "no list": ({"a": 1}, [], r"concepts\.json' holds dict, expected a list of objects"),
    "an unknown key": (
        [{**TOY, "instance_promt": "x"}],
        [],
        r"entry 1 has the unknown key 'instance_promt'\. Did you mean 'instance_prompt'\?",
    ),
    "a folder without images": (
        [{**TOY, "instance_data_dir": "empty"}],
        [],
        r"`instance_data_dir` is 'empty', expected a folder with pictures, but it has none",
    ),
    "equal tokens": (
        [TOY, {**FLAG, "instance_prompt": "a <new1> flag"}],
        [],
        r"the token '<new1>' of concept 'toy' equals the token '<new1>' of concept 'flag': rename one",
    ),
    "a token that begins another": (
        [
            {**TOY, "instance_prompt": "a v1 toy", "token": "v1"},
            {**FLAG, "instance_prompt": "a v10 flag", "token": "v10"},
        ],
        [],
        r"the token 'v1' of concept 'toy' is the beginning of the token 'v10' of concept 'flag': rename one",
    ),
    "a prompt without its token": (
        [{**TOY, "token": "<new2>"}],
        [],
        r"\(toy\): `instance_prompt` is 'a photo of a <new1> toy', expected a prompt with the token '<new2>' as a word",
    ),
    "a token that is a word": (
        [{**TOY, "instance_prompt": "a red toy", "token": "red"}],
        [],
        r"concept 'toy': `token` 'red' is a word of text_encoder's tokenizer already, expected a new one, such as '<red-1>'",
    ),
    "a prompt over the limit": (
        [{**TOY, "eval_prompts": ["a {}" + " on a red background" * 5]}],
        [],
        r"concept 'toy': the prompt 'a <new1> toy on .*' has 23 tokens, expected 18 at most for text_encoder: shorten it",
    ),
    "a prompt of DreamBooth's over the limit": (
        [{key: value for key, value in TOY.items() if key != "eval_prompts"}],
        [],
        r"the prompt 'a <new1> toy .*' has 20 tokens, expected 18 at most .*: give `eval_prompts`, in place of the default ones",
    ),
    "another family": (
        [TOY],
        lambda folder: [
            "--pretrained_model_name_or_path",
            tiny_with(folder, "model_index.json", _class_name="DiTPipeline"),
        ],
        r"`pretrained_model_name_or_path` '.*base' is a DiTPipeline, expected one of: StableDiffusionPipeline, ",
    ),
    "a prediction of the sample": (
        [TOY],
        lambda folder: [
            "--pretrained_model_name_or_path",
            tiny_with(folder, "scheduler/scheduler_config.json", prediction_type="sample"),
        ],
        r"DDIMScheduler of the pipeline has prediction_type 'sample', expected 'epsilon' or .*: take another model",
    ),
    "more concepts than a basis has rows": (
        [TOY, FLAG],
        ["--strategy", "orthogonal_adaptation", "--rank", "33"],
        r"`rank` is 33, so 2 concepts with basis=dealt need 66 orthogonal rows, but the layer .* has \d+ inputs: lower the rank",
    ),
    "thresholds that leave no neuron": (
        [TOY],
        ["--strategy", "cns", "--strategy_options", "general_share=0"],
        r"'cns' finds no entry to train for the concept 'toy', with base_fraction=0.1 and general_share=0: raise one of them",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_written(name, tmp_path):
    entries, options, error = BAD_INPUT[name]
    for noun in ("toy", "flag"):
        write_pictures(tmp_path / noun, 2, seed=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    options = options(tmp_path) if callable(options) else options
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"^error: .*{error}"):
        main(["--concepts", str(tmp_path / "concepts.json"), *options, "--output_dir", str(tmp_path / "run")])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_noun_of_several_tokens_is_said(tmp_path, caplog):
    """The run goes on."""
    caplog.set_level("INFO")
    write_pictures(tmp_path / "toy", 2, seed=0)
    (tmp_path / "concepts.json").write_text(
        json.dumps([{**TOY, "noun": "red toy", "instance_prompt": "a <new1> red toy"}])
    )
    options = ["--max_train_steps", "1", "--no_evaluation", "--concepts", str(tmp_path / "concepts.json")]
    main([*options, "--output_dir", str(tmp_path / "run")])
    assert (
        "concept 'toy': initializer 'red toy' is 2 tokens of text_encoder; the row starts as their mean" in caplog.text
    )
    assert (tmp_path / "run/concepts/toy/concept.json").is_file()
