"""Concepts of a run in stock pipelines: the run's own images, or an unchanged pipeline."""

from __future__ import annotations

import shutil

import pytest
import torch
from concept_runs import drawn, run
from concept_strategies import make_pipe
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from funlora_hf.adapters.base_fingerprint import BaseMismatchError
from funlora_hf.personalization.arguments import ConceptEvaluationArguments
from funlora_hf.personalization.drawing import draw
from funlora_hf.personalization.load_concept import load_concept
from funlora_hf.sampling.drawing import tensor_sha256


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SAMPLING = ConceptEvaluationArguments(num_inference_steps=2, num_samples_per_prompt=2)


def load(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(inputs):
    return load(inputs / "base")


def images(pipe, prompt, name):
    return draw(pipe, [prompt], 2, purpose=name, seed=0, resolution=8, config=SAMPLING)


def state(pipe):
    parts = {**pipe.unet.state_dict(), **pipe.text_encoder.state_dict()}
    tensors = {name: one.clone() for name, one in parts.items()}
    adapters = {name: vars(one).get("_active_adapter") for name, one in pipe.unet.named_modules()}
    return tensors, adapters, len(pipe.tokenizer), getattr(pipe.unet, "_hf_peft_config_loaded", False)


def assert_unchanged(pipe, before):
    now = state(pipe)
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys()
    assert all(torch.equal(one, before[0][name]) for name, one in now[0].items())
    pipe.unload_lora_weights()


def test_the_run_s_images(pipe, finished):
    """To the bit, whichever was loaded before."""
    folder, _ = finished
    for task, (name, prompt) in enumerate((("b0", "a <v0> b"), ("c1", "a <v1> c")), start=1):
        token = load_concept(pipe, folder / "concepts" / name)
        assert token in prompt
        pipe.set_adapters(name)
        assert tensor_sha256(images(pipe, prompt, name)) == drawn(folder, name, task)
    pipe.set_adapters("b0")
    assert tensor_sha256(images(pipe, "a <v0> b", "b0")) == drawn(folder, "b0", 1)
    pipe.delete_adapters(["b0", "c1"])


@pytest.mark.parametrize("strategy", ["textual_inversion", "lora"])
def test_other_strategies(strategy, pipe, inputs, tmp_path):
    run(inputs, tmp_path / "run", strategy=strategy, concept_order=["b0"])
    load_concept(pipe, tmp_path / "run/concepts/b0")
    assert tensor_sha256(images(pipe, "a <v0> b", "b0")) == drawn(tmp_path / "run", "b0", 1)


@pytest.mark.parametrize("strategy", ["funlora", "naive_lora"])
@pytest.mark.parametrize("family", ["pixart", "flux"])
def test_runs_on_transformers(family, strategy, inputs, tmp_path):
    """A whole run with evaluation and prior preservation; a stock pipeline draws what it drew, to the bit."""
    make_pipe(family).save_pretrained(tmp_path / "base")
    base = {"pretrained_model_name_or_path": str(tmp_path / "base"), "resolution": 8, "concept_order": ["b0"]}
    prior = {"with_prior_preservation": True, "num_class_images": 2}
    results = run(inputs, tmp_path / "run", strategy=strategy, **base, **prior)
    assert (results["family"], results["concepts"]) == (family, ["b0"])
    in_model = strategy == "naive_lora"
    pipe = DiffusionPipeline.from_pretrained(tmp_path / ("run/model" if in_model else "base"))
    pipe.set_progress_bar_config(disable=True)
    if not in_model:
        load_concept(pipe, tmp_path / "run/concepts/b0")
    assert tensor_sha256(images(pipe, "a <v0> b", "b0")) == drawn(tmp_path / "run", "b0", 1)


def test_rows_are_those_of_textual_inversion(pipe, inputs, finished):
    other = load(inputs / "base")
    other.load_textual_inversion(finished[0] / "concepts/b0")
    load_concept(pipe, finished[0] / "concepts/b0")
    index = pipe.tokenizer.convert_tokens_to_ids("<v0>")
    assert other.tokenizer.convert_tokens_to_ids("<v0>") == index
    assert torch.equal(*(one.text_encoder.get_input_embeddings().weight[index] for one in (pipe, other)))


def test_concepts_in_a_model_are_refused(pipe, inputs, tmp_path):
    run(inputs, tmp_path / "run", strategy="naive_lora", concept_order=["b0"])
    before = state(pipe)
    with pytest.raises(ValueError, match="its strategy 'naive_lora' changed the model"):
        load_concept(pipe, tmp_path / "run/concepts/b0")
    assert_unchanged(pipe, before)
    loaded = load(tmp_path / "run/model")
    assert tensor_sha256(images(loaded, "a <v0> b", "b0")) == drawn(tmp_path / "run", "b0", 1)


def test_errors_leave_the_pipeline_as_it_was(pipe, finished, tmp_path):
    source = finished[0] / "concepts/b0"
    before = state(pipe)
    for path in (tmp_path, tmp_path / "nowhere", finished[0]):
        with pytest.raises((FileNotFoundError, ValueError)):
            load_concept(pipe, path)
    damaged = shutil.copytree(source, tmp_path / "damaged")
    (damaged / "learned_embeds.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="learned_embeds"):
        load_concept(pipe, damaged)
    assert_unchanged(pipe, before)

    pipe.unet.conv_in.weight.data[0, 0, 0, 0] += 1
    before = state(pipe)
    with pytest.raises(BaseMismatchError):
        load_concept(pipe, source)
    assert_unchanged(pipe, before)


def test_errors_keep_the_active_concept(pipe, finished, tmp_path):
    for name in ("b0", "c1"):
        load_concept(pipe, finished[0] / "concepts" / name)
    for name in ("b0", "c1"):
        pipe.set_adapters(name)
        before = state(pipe)
        with pytest.raises(ValueError, match="`adapter_name` is 'b0', which the model has already"):
            load_concept(pipe, finished[0] / "concepts/b0")
        with pytest.raises(ValueError, match="The token '<v0>' is in the tokenizer already"):
            load_concept(pipe, finished[0] / "concepts/b0", name="other")
        now = state(pipe)
        assert now[1:] == before[1:]
        assert all(torch.equal(one, before[0][key]) for key, one in now[0].items())
        assert pipe.get_active_adapters() == [name]


def test_a_name_without_an_adapter(pipe, inputs, tmp_path):
    run(inputs, tmp_path / "run", strategy="textual_inversion", concept_order=["b0"])
    with pytest.raises(ValueError, match=r"`name` is 'x', expected None: .* has no adapter, only a token"):
        load_concept(pipe, tmp_path / "run/concepts/b0", name="x")
