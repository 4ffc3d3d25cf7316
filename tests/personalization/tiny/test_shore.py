"""The domain of the tiny base: its pictures, and what is read from them."""

from __future__ import annotations

import random

import numpy as np
import PIL.Image
import torch

from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.pictures import load_images
from funlora_hf.personalization.tiny import scenes
from funlora_hf.personalization.tiny.reader import as_tensor, shares_right
from funlora_hf.personalization.tiny.shore import HEIGHT, at_shore, shows_water


def drawn_scenes(count: int) -> list[scenes.Scene]:
    rng = random.Random(5)
    return [scenes.random_scene(rng, composites=0.5, concepts=True) for _ in range(count)]


def at_the_shore(drawn: list[scenes.Scene]) -> torch.Tensor:
    arrays = np.stack([np.asarray(at_shore(scenes.render(scene))) for scene in drawn])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def test_only_a_strip_is_changed():
    scene = scenes.Scene("circle", "red", "white", size="large")
    plain, changed = (np.asarray(image) for image in (scenes.render(scene), at_shore(scenes.render(scene))))
    assert (plain[:-HEIGHT] == changed[:-HEIGHT]).all()
    assert (changed[-HEIGHT:] == scenes.COLOURS["blue"]).all()


def test_water_is_seen_where_it_is_and_the_rest_is_read_as_before():
    drawn = drawn_scenes(200)
    assert shows_water(at_the_shore(drawn)).all()
    assert not shows_water(as_tensor(drawn)).any()
    assert min(shares_right(at_the_shore(drawn), drawn).values()) > 0.95


def test_half_a_strip_is_enough():
    (image,) = as_tensor([scenes.Scene("circle", "red", "white", size="small")])
    images = image.repeat(2, 1, 1, 1)
    blue = torch.tensor(scenes.COLOURS["blue"], dtype=torch.uint8)[:, None, None]
    images[0, :, -HEIGHT:, :16], images[1, :, -HEIGHT:, :15] = blue, blue
    assert shows_water(images).tolist() == [True, False]


def test_two_items_and_the_domain():
    toy, badge, shore = load_concepts("tiny_domain")
    assert [toy, badge] == load_concepts("tiny")[:2]
    assert shows_water(load_images(shore.images, size=scenes.RESOLUTION)).all()
    told = {shore.plain(shore.caption(path)) for path in shore.images}
    assert told <= {scenes.caption(one) for one in scenes.all_told()}
    evaluated = {shore.plain(shore.prompt(template)) for template in shore.eval_prompts}
    assert len(evaluated) == 12
    assert not evaluated & (told | {*scenes.plain_captions()[: scenes.USUAL + scenes.PRIOR]})
    assert shore.prompt_with(toy) == toy.prompt_with(shore) == "a <new6> photo of a <new1> toy on a gray background"
    with PIL.Image.open(shore.images[0]) as image:
        assert image.size == (scenes.RESOLUTION, scenes.RESOLUTION)
