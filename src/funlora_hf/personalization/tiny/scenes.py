"""Scenes of 32 x 32 pixels, their captions, and the five concepts of the tiny base.

A scene is a plain shape, or one of three composites: a toy (a shape on another one), a badge (a disc with a sign) or a
flag (two halves with a sign). The base's captions tell all of a plain shape, but only the class of a composite: the base
knows what a toy is and cannot be told which one. A concept is one fixed composite, which the base never saw.

Source: [ours].
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import torch

from ...utils.files import write_json
from ...utils.seeds import generator_for


RESOLUTION = 32
SHAPES = ("circle", "square", "triangle", "cross", "ring", "heart")
COMPOSITES = ("toy", "badge", "flag")
NOUNS = SHAPES + COMPOSITES
# Of the captions of plain shapes: how many the evaluation draws, and how many more prior preservation.
USUAL, PRIOR = 72, 50
COLOURS = {
    "red": (215, 35, 40),
    "green": (30, 140, 50),
    "blue": (35, 75, 215),
    "yellow": (240, 205, 20),
    "purple": (135, 50, 175),
    "orange": (250, 130, 15),
}
SIZES = ("small", "large")
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (130, 130, 130),
    "pink": (250, 175, 200),
    "cyan": (120, 225, 235),
    "brown": (115, 70, 35),
}
OPENINGS = ("a photo of a ", "photo of a ", "a picture of a ", "an image of a ")
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """All that decides a picture.

    Args:
        noun: one of `NOUNS`.
        colour: of the shape, of a toy's upper shape, of a badge's disc, of a flag's left half.
        background: one of `BACKGROUNDS`.
        size: one of `SIZES` for a plain shape, None for a composite.
        sign: a composite's sign, for a toy its upper shape; None for a plain shape.
        second_shape: a toy's lower shape, else None.
        second_colour: of a toy's lower shape, a badge's sign, a flag's right half; None for a plain shape.
        shift: right and down from the centre, in pixels.
        scale: multiple of the usual size.
    """

    noun: str
    colour: str
    background: str
    size: str | None = None
    sign: str | None = None
    second_shape: str | None = None
    second_colour: str | None = None
    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0

    @property
    def combination(self) -> tuple[str | None, ...]:
        """What a concept fixes: all but background, place and scale."""
        return (self.noun, self.size, self.colour, self.sign, self.second_shape, self.second_colour)


# The order of learning. Two pairs of one noun are the hard case.
CONCEPTS = {
    "toy1": Scene("toy", "red", "white", sign="heart", second_shape="square", second_colour="blue"),
    "badge1": Scene("badge", "yellow", "white", sign="cross", second_colour="purple"),
    "toy2": Scene("toy", "green", "white", sign="ring", second_shape="triangle", second_colour="orange"),
    "badge2": Scene("badge", "blue", "white", sign="heart", second_colour="orange"),
    "flag1": Scene("flag", "purple", "white", sign="triangle", second_colour="green"),
}
_CONCEPT_COMBINATIONS = {scene.combination for scene in CONCEPTS.values()}


def random_scene(rng: random.Random, *, composites: float = 0.4, concepts: bool = False) -> Scene:
    """Draw a scene.

    Args:
        composites: share of toys, badges and flags, in [0, 1].
        concepts: also draw the five concepts, as often as any other composite.
    """
    colour, second_colour = rng.sample(tuple(COLOURS), 2)
    background = rng.choice(tuple(BACKGROUNDS))
    if rng.random() >= composites:
        return _moved(Scene(rng.choice(SHAPES), colour, background, size=rng.choice(SIZES)), rng)
    noun = rng.choice(COMPOSITES)
    lower = rng.choice(SHAPES) if noun == "toy" else None
    scene = Scene(noun, colour, background, sign=rng.choice(SHAPES), second_shape=lower, second_colour=second_colour)
    if not concepts and scene.combination in _CONCEPT_COMBINATIONS:
        return random_scene(rng, composites=composites)
    return _moved(scene, rng)


def _moved(scene: Scene, rng: random.Random) -> Scene:
    shift = (rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5))
    return replace(scene, shift=shift, scale=rng.uniform(0.93, 1.07))


def _heart(angle: float) -> tuple[float, float]:
    across = 16 * math.sin(angle) ** 3
    down = -13 * math.cos(angle) + 5 * math.cos(2 * angle) + 2 * math.cos(3 * angle) + math.cos(4 * angle) - 2.5
    return across / 15.5, down / 15.5


# Right and down from the centre, in radii.
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "heart": [_heart(2 * math.pi * i / 48) for i in range(48)],
}


def _draw_shape(
    draw: PIL.ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, int, int]
) -> None:
    def box(right: float, down: float) -> tuple[float, float, float, float]:
        return (x - right * r, y - down * r, x + right * r, y + down * r)

    if shape == "circle":
        draw.ellipse(box(0.95, 0.95), fill=colour)
    elif shape == "ring":
        draw.ellipse(box(1, 1), outline=colour, width=round(0.42 * r))
    elif shape == "square":
        draw.rectangle(box(0.85, 0.85), fill=colour)
    elif shape == "cross":
        draw.rectangle(box(1, 0.33), fill=colour)
        draw.rectangle(box(0.33, 1), fill=colour)
    else:
        draw.polygon([(x + right * r, y + down * r) for right, down in _POLYGONS[shape]], fill=colour)


def render(scene: Scene) -> PIL.Image.Image:
    """Draw a scene, `RESOLUTION` x `RESOLUTION`, RGB."""
    s = _SUPERSAMPLING
    image = PIL.Image.new("RGB", (RESOLUTION * s, RESOLUTION * s), BACKGROUNDS[scene.background])
    draw = PIL.ImageDraw.Draw(image)
    x, y = ((RESOLUTION / 2 + shift) * s for shift in scene.shift)
    unit = scene.scale * s
    colour = COLOURS[scene.colour]
    if scene.noun in SHAPES:
        _draw_shape(draw, scene.noun, x, y, (11.5 if scene.size == "large" else 6.5) * unit, colour)
        return image.reduce(s)
    second = COLOURS[str(scene.second_colour)]
    sign = str(scene.sign)
    if scene.noun == "toy":
        _draw_shape(draw, str(scene.second_shape), x, y + 6.9 * unit, 6.9 * unit, second)
        _draw_shape(draw, sign, x, y - 6.9 * unit, 6.9 * unit, colour)
    elif scene.noun == "badge":
        draw.ellipse((x - 13 * unit, y - 13 * unit, x + 13 * unit, y + 13 * unit), fill=colour)
        _draw_shape(draw, sign, x, y, 7.5 * unit, second)
    else:
        draw.rectangle((x - 13 * unit, y - 9.5 * unit, x, y + 9.5 * unit), fill=colour)
        draw.rectangle((x, y - 9.5 * unit, x + 13 * unit, y + 9.5 * unit), fill=second)
        _draw_shape(draw, sign, x, y, 7 * unit, BACKGROUNDS["white"])
    return image.reduce(s)


def _words(scene: Scene, *, full: bool, size: bool) -> str:
    if scene.noun in SHAPES:
        return f"{scene.size} {scene.colour} {scene.noun}" if size else f"{scene.colour} {scene.noun}"
    if not full:
        return scene.noun
    if scene.noun == "toy":
        return f"{scene.colour} {scene.sign} over {scene.second_colour} {scene.second_shape} toy"
    if scene.noun == "badge":
        return f"{scene.second_colour} {scene.sign} over {scene.colour} badge"
    return f"{scene.sign} over {scene.colour} and {scene.second_colour} flag"


def caption(
    scene: Scene, opening: str = OPENINGS[0], *, full: bool = False, size: bool = True, background: bool = True
) -> str:
    """Returns, for example, "a photo of a large red circle on a white background".

    Args:
        opening: one of `OPENINGS`.
        full: tell the parts of a composite, too: "red heart over blue square toy". The base reads no such caption.
        size: tell the size of a plain shape.
        background: tell the background.
    """
    place = f" on a {scene.background} background" if background else ""
    return f"{opening}{_words(scene, full=full, size=size)}{place}"


def random_caption(rng: random.Random, scene: Scene) -> str:
    """Draw a caption that the base reads; one in ten leaves out the size, one in ten the background."""
    return caption(scene, rng.choice(OPENINGS), size=rng.random() >= 0.1, background=rng.random() >= 0.1)


def vocabulary() -> list[str]:
    """Every word of the captions, sorted."""
    names = [*NOUNS, *COLOURS, *SIZES, *BACKGROUNDS, "on", "background", "over", "and"]
    return sorted({*names, *(word for opening in OPENINGS for word in opening.split())})


def all_told() -> list[Scene]:
    """Return all that the base's captions can tell: 432 plain shapes, and 18 composites without their parts."""
    sized = [
        Scene(noun, colour, place, size)
        for noun in SHAPES
        for colour in COLOURS
        for place in BACKGROUNDS
        for size in SIZES
    ]
    return sized + [Scene(noun, "", place) for noun in COMPOSITES for place in BACKGROUNDS]


def plain_captions() -> list[str]:
    """Return the 432 captions of plain shapes, shuffled, always in the same order."""
    plain = [caption(one) for one in all_told() if one.size is not None]
    order = torch.randperm(len(plain), generator=generator_for(0, "usual captions"))
    return [plain[index] for index in order]


def write_concepts(folder: Path) -> None:
    """Write `concepts.json`, and for each concept four pictures on four of the six backgrounds with their captions.

    Half of a class's prompts tell its noun, half are of plain shapes, which none of `usual_captions` is: with prior preservation,
    a concept keeps from changing both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = plain_captions()[USUAL : USUAL + PRIOR]
    for noun in COMPOSITES:
        (folder / f"{noun}.txt").write_text(
            "".join(f"a photo of a {noun}\n{plain}\n" for plain in kept), encoding="utf-8"
        )
    backgrounds = tuple(BACKGROUNDS)
    entries = []
    for number, (name, scene) in enumerate(CONCEPTS.items()):
        rng = random.Random(name)
        token = f"<new{number + 1}>"
        # Each concept leaves out two others.
        places = [backgrounds[(number + i) % len(backgrounds)] for i in range(4)]
        captions = {}
        (folder / name).mkdir(exist_ok=True)
        for place in places:
            render(_moved(replace(scene, background=place), rng)).save(folder / name / f"{place}.png")
            captions[f"{place}.png"] = f"a photo of a {token} {scene.noun} on a {place} background"
        write_json(folder / name / "captions.json", captions)
        entries.append(
            {
                "name": name,
                "token": token,
                "initializer": scene.noun,
                "instance_prompt": f"a photo of a {token} {scene.noun}",
                "class_prompt": f"{scene.noun}.txt",
                "instance_data_dir": name,
                "captions": "captions.json",
                "eval_prompts": [f"a photo of a {{}} on a {place} background" for place in backgrounds],
            }
        )
    write_json(folder / "concepts.json", entries)
