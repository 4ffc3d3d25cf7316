from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from funlora_hf.personalization.tiny import scenes
from funlora_hf.personalization.tiny.reader import VALUES, as_tensor, attributes_of, features, read, shares_right
from funlora_hf.personalization.tiny.scenes import Scene


TOY = Scene("toy", "red", "black", sign="heart", second_shape="square", second_colour="blue")


def test_attributes_of():
    shape = Scene("circle", "red", "white", size="large")
    absent = {"sign": -1, "second_shape": -1, "second_colour": -1}
    assert attributes_of(shape) == {"noun": 0, "colour": 0, "background": 0, "size": 1, **absent}
    toy = {"noun": 6, "colour": 0, "background": 1, "size": -1, "sign": 5, "second_shape": 1, "second_colour": 2}
    assert attributes_of(TOY) == toy


def test_reads_each_attribute_of_fresh_renderings():
    rng = random.Random(20_000)
    drawn = [scenes.random_scene(rng, concepts=True) for _ in range(600)]
    shares = shares_right(as_tensor(drawn), drawn)
    assert set(shares) == set(VALUES)
    assert min(shares.values()) >= 0.97


def test_reads_the_concepts():
    drawn = [replace(scene, background=place) for scene in scenes.CONCEPTS.values() for place in scenes.BACKGROUNDS]
    shares = shares_right(as_tensor(drawn), drawn)
    assert shares == dict.fromkeys(set(VALUES) - {"size"}, 1.0)


def test_shares_right_counts_scenes_that_have_the_attribute():
    truth = [TOY, replace(TOY, background="pink"), Scene("circle", "red", "white", size="large")]
    said = [replace(TOY, sign="ring"), truth[1], replace(truth[2], colour="blue", size="small")]
    shares = shares_right(as_tensor(truth), said)
    expected = {"noun": 1, "colour": 2 / 3, "background": 1, "size": 0, "sign": 0.5}
    assert shares == pytest.approx({**expected, "second_shape": 1, "second_colour": 1})


def test_features_of_one_concept_are_closer_than_those_of_two():
    drawn = [replace(scene, background=place) for scene in scenes.CONCEPTS.values() for place in scenes.BACKGROUNDS]
    found = torch.nn.functional.normalize(features(as_tensor(drawn)))
    similar = (found @ found.T).reshape(5, 6, 5, 6).mean((1, 3))
    assert (similar.argmax(1) == torch.arange(5)).all()


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 32, 32), torch.zeros(3, 32, 32).byte(), torch.zeros(1, 3, 64, 64).byte()]
)
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match=r"images: expected uint8 \(n, 3, 32, 32\)"):
        read(images)
