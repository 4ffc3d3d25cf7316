"""Layer-wise rows: what each cross-attention layer reads, and that equal rows are a plain row."""

from __future__ import annotations

import copy

import pytest
import torch
from text_encoders import PIPELINES, make_prompted

from funlora_hf.text_to_image.layer_states import cross_attentions
from funlora_hf.text_to_image.model import TextToImageModel
from funlora_hf.text_to_image.token_rows import load_token_rows


PROMPT = "a <v1> toy"
LAYERS = 4


def make_model(*, layerwise=True, num_vectors=1):
    """A model whose tokens have random rows, the same for all layers."""
    model = TextToImageModel(make_prompted("SD"))
    rows = model.add_rows({"<v1>": "b", "<v2>": "c"}, num_vectors=num_vectors, layerwise=layerwise)
    torch.manual_seed(5)
    with torch.no_grad():
        for row in rows.parameters():
            row.copy_(torch.randn(row.shape[-2:]).expand_as(row))
    return model


def differ(model, token="<v1>"):
    """Give a token another row for each layer."""
    (row,) = model.rows.parameters_of(token).values()
    with torch.no_grad():
        row.add_(torch.randn(row.shape, generator=torch.Generator().manual_seed(6)))
    return row


def image(pipe, prompt=PROMPT, **how):
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.manual_seed(3)}
    return pipe(prompt, **options, **how).images


def prediction(model):
    noisy = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model(noisy, torch.tensor([3, 700]), [PROMPT, "a b"])


def test_the_order_of_layers():
    unet = make_prompted("SD").unet
    assert [name.split(".")[0] for name in cross_attentions(unet)] == [
        "down_blocks",
        "mid_block",
        "up_blocks",
        "up_blocks",
    ]


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_equal_rows_are_a_plain_row(num_vectors):
    """Predictions and images, to the bit."""
    plain, layerwise = (make_model(layerwise=value, num_vectors=num_vectors) for value in (False, True))
    with torch.no_grad():
        assert torch.equal(prediction(layerwise), prediction(plain))
    assert torch.equal(image(layerwise.pipeline()), image(plain.pipeline()))
    assert torch.equal(image(layerwise.pipeline(), "a b"), image(make_prompted("SD"), "a b"))


def test_each_layer_reads_its_own_row():
    """Against an encoder with a plain row, which is set to that of each layer in turn."""
    model, plain = make_model(), make_model(layerwise=False)
    rows = differ(model)
    seen = {}
    for name in cross_attentions(model.denoiser):

        def keep(module, args, name=name):
            seen[name] = args[0]

        model.denoiser.get_submodule(name).to_k.register_forward_pre_hook(keep)
    with torch.no_grad():
        prediction(model)
        for number, states in enumerate(seen.values()):
            plain.rows.parameters_of("<v1>")["text_encoder"].copy_(rows[number])
            assert torch.equal(states, plain.encode([PROMPT, "a b"])["prompt_embeds"])
    assert list(seen) == cross_attentions(model.denoiser)
    assert len({tuple(states[0].flatten().tolist()) for states in seen.values()}) == LAYERS


def test_gradients_reach_the_rows_of_all_layers():
    model = make_model()
    model.rows.train_only(["<v1>"])
    prediction(model).square().sum().backward()
    (trained,), (other,) = (model.rows.parameters_of(token).values() for token in ("<v1>", "<v2>"))
    assert trained.shape == (LAYERS, 1, 16)
    assert (trained.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert other.grad is None


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_a_stock_pipeline_draws_the_same(num_vectors, tmp_path):
    """With both tokens, loaded one after another, and a copy of the pipeline."""
    model = make_model(num_vectors=num_vectors)
    stock = make_prompted("SD")
    for token in ("<v1>", "<v2>"):
        differ(model, token)
        model.rows.save(token, tmp_path / token[1:-1])
        assert load_token_rows(stock, tmp_path / token[1:-1]) == token
    prompt = "<v1> <v2>"
    expected = image(model.pipeline(), prompt)
    assert torch.equal(image(stock, prompt), expected)
    assert torch.equal(image(copy.deepcopy(stock), prompt), expected)
    assert torch.equal(image(stock, "a b"), image(make_prompted("SD"), "a b"))
    assert not torch.equal(image(stock, prompt), image(stock, "<v2> <v1>"))


def test_rows_for_a_saved_pipeline(tmp_path):
    """It knows the token, not the rows of its layers."""
    model = make_model()
    differ(model)
    model.rows.save("<v1>", tmp_path / "rows")
    model.pipeline().save_pretrained(tmp_path / "pipe")
    stock = type(make_prompted("SD")).from_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="'<v1>' is in the tokenizer already"):
        load_token_rows(stock, tmp_path / "rows")
    load_token_rows(stock, tmp_path / "rows", is_known=True)
    assert torch.equal(image(stock), image(model.pipeline()))
    with pytest.raises(ValueError, match="does not know '<v1>': load the pipeline that its run has saved"):
        load_token_rows(make_prompted("SD"), tmp_path / "rows", is_known=True)


def test_rows_are_read_back(tmp_path):
    model, other = make_model(), make_model()
    rows = differ(model)
    model.rows.save("<v1>", tmp_path)
    other.rows.load("<v1>", tmp_path)
    assert torch.equal(other.rows.parameters_of("<v1>")["text_encoder"], rows)
    with pytest.raises(ValueError, match=r"has rows of the shape \(4, 1, 16\), expected \(1, 16\)"):
        make_model(layerwise=False).rows.load("<v1>", tmp_path)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_other_families_are_refused(family, tmp_path):
    model = TextToImageModel(make_prompted(PIPELINES[family]))
    with pytest.raises(ValueError, match=f"family '{family}', expected 'sd'"):
        model.add_rows({"<v1>": "b"}, layerwise=True)
    assert model.rows is None


def test_another_number_of_layers_is_refused(tmp_path):
    model = make_model()
    model.rows.layers.names.pop()
    rows = model.rows.parameters_of("<v1>")["text_encoder"]
    rows.data = rows.data[:3]
    model.rows.save("<v1>", tmp_path)
    stock = make_prompted("SD")
    size = len(stock.tokenizer)
    with pytest.raises(ValueError, match=r"layer-wise rows for 3 layers, .* has 4"):
        load_token_rows(stock, tmp_path)
    assert len(stock.tokenizer) == size


def test_states_without_layers_are_refused():
    pipe, states = make_model().pipeline(), torch.zeros(1, 8, 16)
    with pytest.raises(ValueError, match=r"have width 16, expected 64, .* no `clip_skip`"):
        image(pipe, None, prompt_embeds=states, negative_prompt_embeds=states)
