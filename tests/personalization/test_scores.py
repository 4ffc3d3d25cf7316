"""Scores against features and matrices written by hand, and against the models' own parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from text_to_image import make_pipeline
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from funlora_hf.evaluation.features import extract_features
from funlora_hf.personalization.scores import (
    ClipFeatures,
    DinoFeatures,
    clip_score,
    image_similarity,
    mean_and_error,
    scores_over_time,
    text_similarity,
)


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**sizes, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    make_pipeline("SD").tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder) -> ClipFeatures:
    return ClipFeatures(str(clip_folder))


def dino_folder(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind == "vit":
        model = ViTModel(ViTConfig(**SIZES, image_size=224, patch_size=56), add_pooling_layer=False)
        # As published for DINO: squeezed, not cropped.
        processor = ViTImageProcessor(size={"height": 224, "width": 224}, resample=2, image_mean=MEAN, image_std=STD)
    else:
        model = Dinov2Model(Dinov2Config(**SIZES, image_size=112, patch_size=56))
        processor = CLIPImageProcessor(image_mean=MEAN, image_std=STD)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(count: int, size: int) -> torch.Tensor:
    """Smooth ones."""
    small = torch.randint(256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    return torch.nn.functional.interpolate(small, size=size, mode="bilinear").byte()


def normalized(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def test_features_of_clip(clip):
    images, texts = pictures(3, 16), ["a", "ab c"]
    model = clip.model
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(normalized(images)).pooler_output)
        tokens = clip.tokenizer(texts, padding=True, return_tensors="pt")
        expected_texts = model.text_projection(model.text_model(**tokens).pooler_output)
    torch.testing.assert_close(extract_features(clip, images), expected)
    torch.testing.assert_close(clip.texts(texts), expected_texts)
    torch.testing.assert_close(clip.texts(texts[:1]), expected_texts[:1])
    assert extract_features(clip, pictures(2, 40)).shape == (2, 12)
    with pytest.raises(ValueError, match="The text 'abcdefgh' has more than the 8 tokens that CLIP reads"):
        clip.texts(["a", "abcdefgh"])


@pytest.mark.parametrize("wrapped", [True, False])
def test_features_come_in_an_object_or_not(clip, monkeypatch, wrapped):
    """As in transformers 5, and before it."""
    features = torch.ones(2, 12)

    def returned(**_):
        return SimpleNamespace(pooler_output=features, last_hidden_state=None) if wrapped else features

    for name in ("get_image_features", "get_text_features"):
        monkeypatch.setattr(clip.model, name, returned)
    assert torch.equal(clip(pictures(2, 16)), features)
    assert torch.equal(clip.texts(["a", "b"]), features)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_features_of_dino(tmp_path, kind):
    """Resized to 256 by Pillow, bicubic; the centre of 224 x 224."""
    dino = DinoFeatures(str(dino_folder(tmp_path, kind)))
    images = pictures(2, 100)
    resized = [
        Image.fromarray(one.permute(1, 2, 0).numpy()).resize((256, 256), Image.Resampling.BICUBIC) for one in images
    ]
    cropped = np.stack([np.asarray(one)[16:240, 16:240] for one in resized])
    with torch.no_grad():
        output = dino.model(normalized(torch.tensor(cropped).permute(0, 3, 1, 2)))
    # One of 255 levels, by rounding.
    torch.testing.assert_close(extract_features(dino, images), output.last_hidden_state[:, 0], rtol=0, atol=1e-2)
    assert "pooler.dense.weight" not in dino.model.state_dict()


def test_other_models_are_refused(clip_folder, tmp_path, monkeypatch):
    folder = dino_folder(tmp_path / "dino", "vit")
    with pytest.raises(ValueError, match="is a model of type 'vit', expected one of clip"):
        ClipFeatures(str(folder))
    with pytest.raises(ValueError, match="is a model of type 'clip', expected one of vit, dinov2"):
        DinoFeatures(str(clip_folder))
    smaller = ViTModel(ViTConfig(**SIZES, image_size=224, patch_size=56), add_pooling_layer=False)
    weights = {name: one for name, one in smaller.state_dict().items() if "layernorm" not in name}
    smaller.save_pretrained(folder, state_dict=weights)
    with pytest.raises(ValueError, match=r"has no weights for '.*layernorm.*' and \d more: it is damaged"):
        DinoFeatures(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        DinoFeatures(str(folder))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="did you mean 'dino'"):
        DinoFeatures("dinno")


def test_cosines_by_hand():
    samples = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    references = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert image_similarity(samples, references).tolist() == pytest.approx([(0.6 + 0.8) / 2, (0 - 1) / 2])
    cosines = text_similarity(samples, references)
    assert cosines.tolist() == pytest.approx([0.6, -1])
    assert clip_score(cosines).tolist() == pytest.approx([1.5, 0])
    assert image_similarity(samples, samples[:1])[0].item() == pytest.approx(1, abs=1e-12)


def test_mean_and_error():
    assert mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx((3.0, (14 / 3) ** 0.5 / 2))
    assert mean_and_error(torch.tensor([4.0])) == (4.0, None)


def test_scores_over_time():
    """Concept 0 improves, then falls; concept 1 improves to the end; concept 2 is the last."""
    matrix = [[0.5], [0.75, 0.25], [0.25, 0.5, 1.0]]
    assert scores_over_time(matrix) == {
        "matrix": matrix,
        "own": pytest.approx((0.5 + 0.25 + 1) / 3),
        "end": pytest.approx((0.25 + 0.5 + 1) / 3),
        "forgetting": pytest.approx((0.5 + 0) / 2),
        "drop": pytest.approx((0.25 - 0.25) / 2),
    }


def test_scores_over_time_of_tasks_with_several_concepts_or_one():
    assert scores_over_time([[1.0, 0.5], [0.5, 0.5, 0.0, 0.2]])["forgetting"] == pytest.approx(0.25)
    assert scores_over_time([[0.5]])["forgetting"] == scores_over_time([[0.5]])["drop"] == 0
