from __future__ import annotations

import random
from dataclasses import replace

import torch
from transformers import AutoModel, AutoProcessor

from funlora_hf.personalization.tiny import scenes, tiny_dual_encoder
from funlora_hf.personalization.tiny.dual_encoder import agreement, ranks_first
from funlora_hf.personalization.tiny.reader import as_tensor, attributes_of
from funlora_hf.personalization.tiny.scenes import Scene


TOY = Scene("toy", "red", "black", sign="heart", second_shape="square", second_colour="blue")


def test_agreement():
    drawn = [TOY, replace(TOY, sign="ring"), replace(TOY, background="pink"), Scene("ring", "red", "black", "small")]
    no_sign = attributes_of(TOY) | {"sign": -1}
    no_background = attributes_of(TOY) | {"background": -1}
    true = agreement(drawn, [attributes_of(TOY), no_sign, no_background])
    assert true.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]]


def test_the_true_caption_ranks_first():
    rng = random.Random(30_000)
    drawn = [scenes.random_scene(rng, concepts=True) for _ in range(300)]
    shares = ranks_first(tiny_dual_encoder(), as_tensor(drawn), drawn)
    assert shares["captions"] >= 0.9
    assert shares["images"] >= 0.9


def test_transformers_loads_it_in_float32():
    model = AutoModel.from_pretrained(tiny_dual_encoder())
    assert type(model).__name__ == "CLIPModel"
    assert model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(tiny_dual_encoder())
    inputs = processor(text=["a toy"], images=[scenes.render(TOY)], return_tensors="pt")
    expected = as_tensor([TOY]).float() / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-6, rtol=0)
