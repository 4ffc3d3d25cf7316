from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.tiny import scenes, tiny_concepts
from funlora_hf.personalization.tiny.scenes import Scene
from funlora_hf.personalization.tiny.shore import write_shore
from funlora_hf.personalization.usual_captions import usual_captions


SHAPE = Scene("circle", "red", "white", size="large")
TOY = Scene("toy", "red", "black", sign="heart", second_shape="square", second_colour="blue")
BADGE = Scene("badge", "yellow", "pink", sign="cross", second_colour="purple")
FLAG = Scene("flag", "purple", "cyan", sign="ring", second_colour="green")


def pixels(scene):
    return np.asarray(scenes.render(scene))


def test_colours_are_where_they_belong():
    """By hand: corners, centre, and what lies around."""
    expected = {
        SHAPE: {(0, 0): "white", (16, 16): "red"},
        replace(SHAPE, noun="ring"): {(16, 16): "white", (16, 7): "red"},
        replace(SHAPE, size="small"): {(16, 8): "white", (16, 16): "red"},
        TOY: {(9, 16): "red", (23, 16): "blue", (16, 2): "black"},
        BADGE: {(16, 16): "purple", (16, 5): "yellow", (0, 0): "pink"},
        FLAG: {(16, 5): "purple", (16, 27): "green", (16, 15): "purple", (16, 17): "green", (2, 16): "cyan"},
    }
    colours = scenes.COLOURS | scenes.BACKGROUNDS
    for scene, places in expected.items():
        image = pixels(scene)
        assert image.shape == (32, 32, 3)
        assert {place: tuple(image[place].tolist()) for place in places} == {
            place: colours[name] for place, name in places.items()
        }


@pytest.mark.parametrize(
    ("scene", "changes"),
    [
        (SHAPE, {"noun": "square", "colour": "blue", "size": "small", "background": "pink", "scale": 0.9}),
        (TOY, {"sign": "ring", "second_shape": "cross", "second_colour": "green", "shift": (1.0, 0.0)}),
        (BADGE, {"sign": "ring", "second_colour": "green", "colour": "red"}),
        (FLAG, {"sign": "heart", "second_colour": "blue", "colour": "red"}),
    ],
)
def test_a_picture_depends_on_each_attribute(scene, changes):
    assert (pixels(scene) == pixels(replace(scene))).all()
    for name, value in changes.items():
        assert (pixels(scene) != pixels(replace(scene, **{name: value}))).any(), name


def test_captions():
    assert scenes.caption(SHAPE) == "a photo of a large red circle on a white background"
    assert scenes.caption(SHAPE, "an image of a ", size=False) == "an image of a red circle on a white background"
    assert scenes.caption(TOY) == "a photo of a toy on a black background"
    assert scenes.caption(TOY, background=False) == "a photo of a toy"
    assert scenes.caption(TOY, full=True) == "a photo of a red heart over blue square toy on a black background"
    assert scenes.caption(BADGE, full=True) == "a photo of a purple cross over yellow badge on a pink background"
    assert scenes.caption(FLAG, full=True) == "a photo of a ring over purple and green flag on a cyan background"
    told = [scenes.caption(scene) for scene in scenes.all_told()]
    assert len(told) == len(set(told)) == 6 * 6 * 2 * 6 + 3 * 6


def test_vocabulary_has_the_words_of_all_captions():
    rng = random.Random(0)
    drawn = [scenes.random_scene(rng) for _ in range(2000)]
    captions = [scenes.random_caption(rng, scene) for scene in drawn]
    captions += [scenes.caption(scene, full=True) for scene in drawn]
    assert {word for caption in captions for word in caption.split()} == set(scenes.vocabulary())


def test_the_base_sees_no_concept_and_reads_no_part_of_a_composite():
    combinations = {scene.combination for scene in scenes.CONCEPTS.values()}
    rng = random.Random(0)
    drawn = [scenes.random_scene(rng) for _ in range(20_000)]
    assert not combinations & {scene.combination for scene in drawn}
    assert combinations == combinations & {
        scenes.random_scene(rng, composites=1, concepts=True).combination for _ in range(20_000)
    }
    parts = {*scenes.SHAPES, *scenes.COLOURS}
    composites = [scene for scene in drawn if scene.noun in scenes.COMPOSITES]
    assert not any(parts & set(scenes.random_caption(rng, scene).split()) for scene in composites)


def test_concepts_are_as_written(tmp_path):
    folder = tiny_concepts().parent
    scenes.write_concepts(tmp_path)
    write_shore(tmp_path)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert names == sorted(path.relative_to(folder) for path in folder.rglob("*"))
    for name in names:
        if name.suffix in (".json", ".txt"):
            assert (folder / name).read_text() == (tmp_path / name).read_text()
        elif name.suffix == ".png":
            with PIL.Image.open(folder / name) as shipped, PIL.Image.open(tmp_path / name) as written:
                assert (np.asarray(shipped) == np.asarray(written)).all()


def test_concepts():
    entries = json.loads(tiny_concepts().read_text())
    assert [entry["name"] for entry in entries] == list(scenes.CONCEPTS)
    assert Counter(entry["initializer"] for entry in entries) == {"toy": 2, "badge": 2, "flag": 1}
    for entry in entries:
        folder = tiny_concepts().parent / entry["instance_data_dir"]
        captions = json.loads((folder / entry["captions"]).read_text())
        assert sorted(captions) == sorted(path.name for path in folder.glob("*.png"))
        assert len(captions) == 4
        for file, caption in captions.items():
            background = caption.split()[-2]
            assert caption == f"{entry['instance_prompt']} on a {background} background"
            with PIL.Image.open(folder / file) as image:
                assert image.getpixel((0, 31)) == scenes.BACKGROUNDS[background]
        assert len(set(entry["eval_prompts"])) == 6
    for concept in load_concepts("tiny"):
        of_class, plain = concept.class_prompts[::2], concept.class_prompts[1::2]
        assert {*of_class} == {f"a photo of a {concept.noun}"} == {concept.class_caption}
        assert len({*plain}) == len(of_class) == 50
        assert {*plain} < {scenes.caption(one) for one in scenes.all_told() if one.size} - {*usual_captions(tiny=True)}
