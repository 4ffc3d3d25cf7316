"""Judges on what they must tell apart: concepts, backgrounds and words of the tiny base."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from funlora_hf.personalization.arguments import ConceptEvaluationArguments
from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.judges import ClipJudge, TinyJudge, judges
from funlora_hf.personalization.pictures import load_images
from funlora_hf.personalization.tiny.reader import as_tensor
from funlora_hf.personalization.tiny.scenes import Scene, caption


@pytest.fixture(scope="module")
def concepts():
    return {one.name: one for one in load_concepts("tiny")}


def references(concept):
    return load_images(concept.references, size=32), [concept.plain(concept.caption(p)) for p in concept.references]


def test_the_reader_knows_every_concept(concepts):
    judge = TinyJudge()
    for name, concept in concepts.items():
        images, prompts = references(concept)
        found = judge.concept(images, concept, prompts)
        assert found.keys() == {"attr", "whole", "sim", "background"}
        assert all(values.shape == (4,) for values in found.values())
        assert (found["attr"] == 1).all()
        assert (found["whole"] == 1).all()
        assert (found["background"] == 1).all()
        for other in concepts:
            if other != name:
                wrong = judge.concept(references(concepts[other])[0], concept, prompts)
                assert wrong["attr"].max() <= 0.6, other
                assert wrong["whole"].max() == 0
                assert wrong["sim"].mean() < found["sim"].mean()


def test_one_wrong_attribute_is_one_share(concepts):
    """Of the five of a toy, of the four of a badge."""
    wrong = as_tensor(
        [Scene("toy", "red", "white", sign="heart", second_shape="square", second_colour=c) for c in ("blue", "green")]
    )
    found = TinyJudge().concept(wrong, concepts["toy1"], ["a toy"] * 2)
    torch.testing.assert_close(found["attr"], torch.tensor([1.0, 0.8]))
    assert found["whole"].tolist() == [1.0, 0.0]
    assert "background" not in found
    badge = as_tensor([Scene("badge", "yellow", "white", sign="heart", second_colour="purple")])
    assert TinyJudge().concept(badge, concepts["badge1"], ["a badge"])["attr"].tolist() == [0.75]


def test_the_reader_reads_base_prompts():
    scenes = [Scene("circle", "red", "pink", size="large"), Scene("square", "blue", "cyan", size="small")]
    images, prompts = as_tensor(scenes), [caption(one) for one in scenes]
    judge = TinyJudge()
    right = judge.base(images, prompts)
    assert right.keys() == {"shape", "colour", "size", "background"}
    assert all((values == 1).all() for values in right.values())
    assert all((values == 0).all() for values in judge.base(images, prompts[::-1]).values())
    assert judge.base(images, ["a red thing", "a blue thing"])["colour"].tolist() == [1, 1]
    assert judge.base(images, ["a red thing", "a blue thing"])["shape"].tolist() == [0, 0]
    torch.testing.assert_close(judge.similarity(images, images), torch.ones(2))


def test_the_reader_knows_the_domain():
    """Water is what the style is; all that the prompt tells is what makes it whole."""
    _, _, shore = load_concepts("tiny_domain")
    images, prompts = references(shore)
    found = TinyJudge().concept(images, shore, prompts)
    assert found.keys() == {"attr", "whole", "sim", "background"}
    assert (found["attr"] == 1).all()
    assert found["whole"].mean() > 0.9
    plain = as_tensor([Scene("circle", "red", "pink", size="large")])
    assert TinyJudge().concept(plain, shore, ["a photo of a large red circle"])["attr"].tolist() == [0]
    wrong = TinyJudge().concept(images[:1], shore, ["a photo of a large red circle on a brown background"])
    assert (wrong["attr"].item(), wrong["whole"].item(), wrong["background"].item()) == (1, 0, 1)
    unknown = dataclasses.replace(shore, references=load_concepts("tiny")[0].references)
    assert TinyJudge().concept(plain, unknown, ["a photo"]).keys() == {"sim"}


def test_a_plain_shape_as_a_concept(tmp_path, concepts):
    images = as_tensor([Scene("circle", "red", "pink", size="large")])
    path = tmp_path / "c" / "one.png"
    path.parent.mkdir()
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(path)
    (tmp_path / "concepts.json").write_text(
        '[{"instance_data_dir": "c", "instance_prompt": "a <v> circle", "noun": "circle"}]'
    )
    (concept,) = load_concepts(tmp_path / "concepts.json")
    wrong = as_tensor([Scene("circle", colour, "white", size="large") for colour in ("red", "blue")])
    torch.testing.assert_close(TinyJudge().concept(wrong, concept, ["a", "a"])["attr"], torch.tensor([1, 2 / 3]))


def test_the_dual_encoder_follows_prompts(concepts):
    _, clip = judges(ConceptEvaluationArguments(), tiny=True, device=torch.device("cpu"))
    assert isinstance(clip, ClipJudge)
    images, prompts = references(concepts["toy1"])
    own = clip.concept(images, concepts["toy1"], prompts)
    other = clip.concept(images, concepts["flag1"], ["a photo of a flag on a brown background"] * 4)
    assert own["clip_i"].mean() > other["clip_i"].mean() + 0.2
    assert own["clip_t"].mean() > other["clip_t"].mean() + 0.2
    torch.testing.assert_close(own["clip_score"], 2.5 * own["clip_t"].clamp(min=0))


def test_which_judges(inputs):
    device = torch.device("cpu")
    assert judges(ConceptEvaluationArguments(), tiny=False, device=device) == []
    given = ConceptEvaluationArguments(clip_model=str(inputs / "clip"))
    assert [type(one) for one in judges(given, tiny=False, device=device)] == [ClipJudge]
    assert [type(one) for one in judges(given, tiny=True, device=device)] == [TinyJudge, ClipJudge]
