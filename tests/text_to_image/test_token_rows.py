"""Rows of new tokens: what trains, and that stock pipelines read what was trained and saved, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from diffusers import FluxImg2ImgPipeline, FluxPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from text_encoders import PIPELINES, make_prompted
from transformers import T5Tokenizer

from funlora_hf.text_to_image.model import TextToImageModel
from funlora_hf.text_to_image.token_rows import (
    TokenRows,
    load_token_rows,
    prompt_arguments,
    with_vectors,
    without_tokens,
)


ENCODERS = {
    "sd": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "sd3": ["text_encoder", "text_encoder_2"],
    "pixart": ["text_encoder"],
    "flux": ["text_encoder", "text_encoder_2"],
}
PROMPT = "a <v1> toy"


def make_stock(family):
    pipe = make_prompted(PIPELINES[family])
    pipe.tokenizer_max_length = 8  # SD3's reads it before its tokenizers are there
    return pipe


def add_rows(family, tokens=("<v1>", "<v2>"), num_vectors=1):
    """A model with rows that differ from their initializers."""
    model = TextToImageModel(make_prompted(PIPELINES[family]))
    rows = model.add_rows(dict.fromkeys(tokens, "b"), num_vectors=num_vectors)
    torch.manual_seed(5)
    with torch.no_grad():
        for row in rows.parameters():
            row.normal_()
    return model, rows


@torch.no_grad()
def states(pipe, prompt=PROMPT):
    """What the pipeline's own `encode_prompt` returns, without guidance."""
    arguments = prompt_arguments(pipe, prompt)
    if "prompt_3" in arguments:
        arguments["prompt_2"] = None
    options = {"num_images_per_prompt": 1}
    if not isinstance(pipe, FluxPipeline):
        options["do_classifier_free_guidance"] = False
    found = pipe.encode_prompt(device="cpu", **arguments, **options)
    return [part for part in found if part is not None]


def assert_equal(one, other):
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_pipeline_that_draws_from_an_image_gets_every_vector():
    model, _ = add_rows("flux", ["<v1>"], num_vectors=2)
    pipe = FluxImg2ImgPipeline(**model.pipeline().components)
    assert prompt_arguments(pipe, "a <v1>") == {"prompt": ["a <v1> <v1>_1"]}


def test_the_tokenizer_keeps_the_words_around_a_token():
    model, _ = add_rows("sd")
    assert model.tokenizers["text_encoder"].tokenize("a <v1> toy") == ["a</w>", "<v1>", "t", "o", "y</w>"]


@pytest.mark.skipif(transformers.__version__ < "5", reason="its tokenizer takes a vocabulary from transformers 5 on")
def test_t5_s_tokenizer_keeps_the_words_around_a_token():
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *((word, -1.0) for word in ("▁a", "▁toy", "▁"))], extra_ids=0)
    encoder = make_prompted("PixArt").text_encoder
    toy = encoder.get_input_embeddings().weight[4].clone()
    rows = TokenRows({"text_encoder": encoder}, {"text_encoder": tokenizer}, {"<v1>": "toy"}, num_vectors=2)
    assert torch.equal(rows.parameters_of("<v1>")["text_encoder"], toy.expand(2, -1))
    (text,) = with_vectors(["a <v1> toy"], tokenizer)
    assert tokenizer.tokenize(text) == ["▁a", "<v1>", "<v1>_1", "▁toy"]


@pytest.mark.parametrize("family", PIPELINES)
def test_rows_begin_as_copies_and_change_no_state(family):
    """With the embedding's own entry as the row, states are those of the resized text encoder without the hook."""
    model = TextToImageModel(make_prompted(PIPELINES[family]))
    rows = model.add_rows({"<v1>": "b"})
    for key in ENCODERS[family]:
        encoder, tokenizer = model.text_encoders[key], model.tokenizers[key]
        weight = encoder.get_input_embeddings().weight
        (start,) = tokenizer("b", add_special_tokens=False).input_ids
        assert torch.equal(rows.parameters_of("<v1>")[key][0], weight[start])
        assert torch.equal(weight[tokenizer.convert_tokens_to_ids("<v1>")], weight[start])
    hooked = states(model.pipeline())
    for key in ENCODERS[family]:
        model.text_encoders[key].get_input_embeddings()._forward_hooks.clear()
    assert_equal(states(model.pipeline()), hooked)


def test_an_initializer_of_several_pieces_is_their_mean():
    model = TextToImageModel(make_prompted("SD"))
    rows = model.add_rows({"<v1>": "toy"}, num_vectors=2)
    ids = model.tokenizers["text_encoder"]("toy", add_special_tokens=False).input_ids
    mean = model.text_encoders["text_encoder"].get_input_embeddings().weight[ids].mean(dim=0)
    assert torch.equal(rows.parameters_of("<v1>")["text_encoder"], mean.expand(2, -1))


@pytest.mark.parametrize("family", PIPELINES)
def test_gradients_reach_the_trained_row_only(family):
    model, rows = add_rows(family)
    rows.train_only(["<v1>"])
    loss = sum(part.square().sum() for part in model.encode([PROMPT, "a <v2> b"]).values())
    loss.backward()
    with_gradient = {
        name for name, one in model.named_parameters() if one.grad is not None and one.grad.abs().sum() > 0
    }
    assert with_gradient == {f"rows.rows.{key}.0" for key in ENCODERS[family]}
    assert {name for name, one in model.named_parameters() if one.requires_grad} == with_gradient


def test_the_gradient_is_that_of_the_embedding():
    """Against an embedding that is trained as a whole, as in diffusers' script."""
    model, rows = add_rows("sd")
    rows.train_only(["<v1>"])
    model.encode([PROMPT])["prompt_embeds"].square().sum().backward()
    pipe = make_prompted("SD")
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    tokenizer.add_tokens(["<v1>"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    place = tokenizer.convert_tokens_to_ids("<v1>")
    with torch.no_grad():
        encoder.get_input_embeddings().weight[place] = rows.parameters_of("<v1>")["text_encoder"][0]
    ids = tokenizer([PROMPT], padding="max_length", max_length=8, return_tensors="pt").input_ids
    encoder(ids)[0].square().sum().backward()
    expected = encoder.get_input_embeddings().weight.grad[place]
    torch.testing.assert_close(rows.parameters_of("<v1>")["text_encoder"].grad[0], expected)


@pytest.mark.parametrize("num_vectors", [1, 3])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_saved_rows_load_into_a_stock_pipeline_by_diffusers(family, num_vectors, tmp_path):
    model, rows = add_rows(family, num_vectors=num_vectors)
    rows.save("<v1>", tmp_path)
    stock = make_stock(family)
    for key, name in zip(
        ENCODERS[family], ["learned_embeds.safetensors", "learned_embeds_2.safetensors"], strict=False
    ):
        tokenizer = getattr(stock, key.replace("text_encoder", "tokenizer"))
        encoder = getattr(stock, key)
        stock.load_textual_inversion(tmp_path, weight_name=name, tokenizer=tokenizer, text_encoder=encoder)
    assert_equal(states(stock), states(model.pipeline()))
    assert torch.equal(states(stock)[0], model.encode([PROMPT])["prompt_embeds"])


@pytest.mark.parametrize("num_vectors", [1, 3])
@pytest.mark.parametrize("family", PIPELINES)
def test_saved_rows_load_into_a_stock_pipeline_by_us(family, num_vectors, tmp_path):
    model, rows = add_rows(family, num_vectors=num_vectors)
    rows.save("<v1>", tmp_path)
    stock = make_stock(family)
    before = states(stock, "a b")
    assert load_token_rows(stock, tmp_path) == "<v1>"
    assert_equal(states(stock), states(model.pipeline()))
    assert_equal(states(stock, "a b"), before)
    assert torch.equal(states(stock)[0], model.encode([PROMPT])["prompt_embeds"])


@pytest.mark.parametrize("family", PIPELINES)
def test_rows_are_read_back(family, tmp_path):
    _, rows = add_rows(family)
    rows.save("<v1>", tmp_path)
    _, other = add_rows(family, tokens=["<w>", "<v1>"])
    untouched = copy.deepcopy(dict(other.parameters_of("<w>")))
    other.load("<v1>", tmp_path)
    for key, row in rows.parameters_of("<v1>").items():
        assert torch.equal(other.parameters_of("<v1>")[key], row)
        assert torch.equal(other.parameters_of("<w>")[key], untouched[key])


def test_a_saved_pipeline_has_the_present_rows(tmp_path):
    """Also those that were trained after the pipeline was made."""
    model, rows = add_rows("sd")
    pipe = model.pipeline()
    with torch.no_grad():
        rows.parameters_of("<v1>")["text_encoder"].add_(1)
    pipe.save_pretrained(tmp_path)
    assert_equal(states(StableDiffusionPipeline.from_pretrained(tmp_path)), states(pipe))


def test_a_copy_has_rows_of_its_own():
    model, _ = add_rows("sd")
    other = copy.deepcopy(model)
    before = model.encode([PROMPT])["prompt_embeds"]
    assert torch.equal(other.encode([PROMPT])["prompt_embeds"], before)
    with torch.no_grad():
        other.rows.parameters_of("<v1>")["text_encoder"].add_(1)
    assert torch.equal(model.encode([PROMPT])["prompt_embeds"], before)
    assert not torch.equal(other.encode([PROMPT])["prompt_embeds"], before)


def test_names_of_vectors_and_longer_tokens_do_not_disturb_each_other():
    model, _ = add_rows("sd", tokens=["<v1>", "<v10>", "v1"], num_vectors=2)
    tokenizer = model.tokenizers["text_encoder"]
    assert tokenizer.tokenize("a <v1>_1 <v10> <v1>") == ["a</w>", "<v1>_1", "<v10>", "<v1>"]
    assert without_tokens("A <V10> toy, <v1>  in v1", model.rows.tokens) == "A toy, in"
    assert without_tokens("a  b", []) == "a  b"


@pytest.mark.parametrize(
    ("tokens", "num_vectors", "message"),
    [
        ({"a</w>": "b"}, 1, "token 'a</w>' is in the tokenizer already"),
        ({"<v1>": "b", "<X>": "b"}, 1, "token '<X>' is read as .*, expected one token in lower case"),
        ({"<v1>": ""}, 1, "initializer is ''"),
        ({"<v1>": "?"}, 1, r"initializer is '\?'"),
        ({"<v1>": "b"}, 7, "has 7 vectors, expected at most 6"),
        ({"<v1>": "b"}, 0, "`num_vectors` should be a positive integer"),
    ],
)
def test_tokens_that_cannot_be_added_change_nothing(tokens, num_vectors, message):
    pipe = make_prompted("SDXL")
    encoders = {key: getattr(pipe, key) for key in ENCODERS["sdxl"]}
    tokenizers = {"text_encoder": pipe.tokenizer, "text_encoder_2": pipe.tokenizer_2}
    sizes = [len(pipe.tokenizer), len(pipe.tokenizer_2), pipe.text_encoder.get_input_embeddings().num_embeddings]
    with pytest.raises(ValueError, match=message):
        TokenRows(encoders, tokenizers, tokens, num_vectors=num_vectors)
    assert [
        len(pipe.tokenizer),
        len(pipe.tokenizer_2),
        pipe.text_encoder.get_input_embeddings().num_embeddings,
    ] == sizes


def test_rows_that_are_not_finite_are_not_saved(tmp_path):
    _, rows = add_rows("sdxl")
    with torch.no_grad():
        rows.parameters_of("<v1>")["text_encoder_2"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="rows of '<v1>' are not saved: text_encoder_2: found NaN"):
        rows.save("<v1>", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`token` is '<v3>', expected one of: '<v1>', '<v2>'"):
        rows.save("<v3>", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: save_file({"<x>": torch.ones(1, 8)}, folder / "learned_embeds_2.safetensors"),
            "under the same token",
        ),
        (
            lambda folder: save_file({"<v1>": torch.ones(1, 5)}, folder / "learned_embeds_2.safetensors"),
            "width 5|shape .1, 5.",
        ),
        (
            lambda folder: save_file({"<v1>": torch.ones(1, 8) / 0}, folder / "learned_embeds_2.safetensors"),
            "infinity",
        ),
        (lambda folder: save_file({}, folder / "learned_embeds_2.safetensors"), "has nothing, expected one matrix"),
        (lambda folder: (folder / "learned_embeds_2.safetensors").write_text("x"), "not a valid safetensors file"),
        (lambda folder: (folder / "learned_embeds_2.safetensors").unlink(), "learned_embeds_2"),
    ],
)
def test_damaged_files_change_nothing(change, message, tmp_path):
    _, rows = add_rows("sdxl")
    rows.save("<v1>", tmp_path)
    change(tmp_path)
    before = copy.deepcopy(rows.state_dict())
    with torch.no_grad():
        rows.parameters_of("<v1>")["text_encoder"].add_(0)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rows.load("<v1>", tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in rows.state_dict().items())
    pipe = make_prompted("SDXL")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_token_rows(pipe, tmp_path)
    assert len(pipe.tokenizer) == len(make_prompted("SDXL").tokenizer)


def test_rows_of_another_pipeline_are_refused(tmp_path):
    _, rows = add_rows("sdxl")
    rows.save("<v1>", tmp_path)
    with pytest.raises(ValueError, match=r"has learned_embeds_2\.safetensors, for which there is no text encoder"):
        load_token_rows(make_prompted("SD"), tmp_path)
    stock = make_prompted("SDXL")
    load_token_rows(stock, tmp_path)
    with pytest.raises(ValueError, match="token '<v1>' is in the tokenizer already"):
        load_token_rows(stock, tmp_path)


def test_what_does_not_fit_float16_is_refused(tmp_path):
    _, rows = add_rows("sd")
    with torch.no_grad():
        rows.parameters_of("<v1>")["text_encoder"][0, 0] = 1e6
    rows.save("<v1>", tmp_path)
    assert load_file(tmp_path / "learned_embeds.safetensors")["<v1>"].dtype == torch.float32
    pipe = make_prompted("SD").to(torch.float16)
    with pytest.raises(ValueError, match=r"does not fit torch\.float16"):
        load_token_rows(pipe, tmp_path)
