"""The family of the guide against its stock pipeline: one class is all that it needs."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from runs import REPOSITORY
from text_encoders import make_prompted

from funlora_hf.text_to_image import families, token_rows
from funlora_hf.text_to_image.model import LAYERS, TextToImageModel
from funlora_hf.text_to_image.token_rows import prompt_arguments


@pytest.fixture
def model(monkeypatch):
    page = (REPOSITORY / "docs/guides/personalization.md").read_text(encoding="utf-8")
    names = {}
    exec(
        re.search(r"^```python\n(.*?class AuraFlow.*?)^```", page, re.M | re.S)[1].rpartition("```python\n")[2], names
    )
    for module in (families, token_rows):
        monkeypatch.setattr(module, "FAMILIES", (*families.FAMILIES, names["AuraFlow"]))
    parts = make_prompted("PixArt").components
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "joint_attention_dim": 16,
    }
    layers = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 16}
    denoiser = AuraFlowTransformer2DModel(sample_size=8, in_channels=4, out_channels=4, **sizes, **layers).eval()
    others = {"transformer": denoiser, "scheduler": FlowMatchEulerDiscreteScheduler()}
    return TextToImageModel(AuraFlowPipeline(**{**parts, **others}))


def test_prompts_and_predictions_of_another_family(model):
    rows = model.add_rows({"<v1>": "b"}, num_vectors=2)
    torch.nn.init.normal_(next(rows.parameters()))
    pipe, calls = model.pipeline(), []
    assert (type(pipe), model.family, model.denoiser.config.sample_size) == (AuraFlowPipeline, "aura_flow", 8)
    model.denoiser.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out[0])), with_kwargs=True
    )
    pipe(**prompt_arguments(pipe, "a <v1> toy"), height=8, width=8, num_inference_steps=2, output_type="latent")
    recorded = list(calls)
    assert len(recorded) == 2
    states = model.encode(["", "a <v1> toy"])["prompt_embeds"]
    for (noisy,), kwargs, out in recorded:
        assert torch.equal(kwargs["encoder_hidden_states"], states)
        torch.testing.assert_close(model(noisy, 1000 * kwargs["timestep"], ["", "a <v1> toy"]), out)


def test_layers_of_another_family(model):
    assert [len(model.layers(kind)) for kind in LAYERS] == [2, 4, 12, 2]
