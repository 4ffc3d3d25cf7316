"""Pictures of a concept's class, for prior preservation: given, or drawn once by the base."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..continual.run_folder import differences, told
from ..data.image_folder import is_image
from ..text_to_image.token_rows import prompt_arguments
from ..utils.checks import shortened
from ..utils.files import read_mapping, whole_file, write_json
from ..utils.seeds import generator_for
from .concepts import Concept
from .pictures import captions_beside, load_images, pictures


logger = logging.getLogger(__name__)

# In the folder of drawn images: what they were drawn from.
ORIGIN = ".drawn.json"


@dataclass(frozen=True)
class Prior:
    """Pictures of classes, of which each batch has some.

    Args:
        images: id of a concept -> pictures of its class -> their captions.
        loss_weight: weight of the mean of their losses.
        batch_size: how many are in a batch, over all processes; None: as many as pictures of concepts.
    """

    images: Mapping[int, Mapping[Path, str]]
    loss_weight: float = 1.0
    batch_size: int | None = None


def class_images(
    pipe: Any,
    concepts: Mapping[int, Concept],
    folder: Path,
    *,
    num_class_images: int,
    resolution: int,
    seed: int,
    sample_batch_size: int,
    origin: Mapping[str, Any],
    accelerator: Any,
    **options: Any,
) -> dict[int, dict[Path, str]]:
    """Return pictures of the class of each concept with their captions; the base draws those that are missing.

    Every process calls this, and draws a part. Concepts with the same prompts of their class share its pictures. The caption of
    `a.png` is `a.txt` beside it, as drawing from several prompts writes it, or else the concept's `class_caption`.

    Args:
        pipe: the base's pipeline.
        concepts: by id; a concept without a `class_data_dir` gets a folder in `folder`.
        resolution: height and width of what is drawn.
        seed: of the run.
        sample_batch_size: pictures to draw at once.
        origin: name and revision of the base: pictures that another one has drawn are refused.
        options: of the pipeline, such as `num_inference_steps`.

    Raises:
        ValueError: a folder has a file that is no picture, or pictures that were drawn otherwise.
    """
    folders = {number: one.class_data_dir or folder / _folder_name(one) for number, one in concepts.items()}
    for place in dict.fromkeys(folders.values()):
        if place.is_dir() and (there := pictures(place, beside=".txt")):
            load_images(there[:num_class_images], size=8)
            if len(there) > num_class_images:
                logger.info("%s has %d pictures, of which the first %d are used", place, len(there), num_class_images)
    found = {}
    for number, place in folders.items():
        concept = concepts[number]
        if (asked := len(concept.class_prompts)) > num_class_images:
            logger.info(
                "%s has %d prompts of its class, of which the first %d are used", concept.name, asked, num_class_images
            )

        def draw(prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
            size = {"height": resolution, "width": resolution}
            return pipe(**prompt_arguments(pipe, prompts), generator=generators, **size, **options).images

        draw_missing(
            place,
            num_class_images,
            draw,
            prompts=concept.class_prompts or (concept.class_caption,),
            origin={**origin, "resolution": resolution, "seed": seed, **options},
            sample_batch_size=sample_batch_size,
            seed=seed,
            accelerator=accelerator,
        )
        there = pictures(place, beside=".txt")[:num_class_images]
        captions = captions_beside(there)
        found[number] = {path: captions.get(path.name, concept.class_caption) for path in there}
    return found


def _folder_name(concept: Concept) -> str:
    """Return the name of a folder for pictures that are drawn of a concept's class, the same for the same prompts."""
    name = re.sub(r"[^\w-]+", "_", concept.class_caption)[:64]
    if len(concept.class_prompts) < 2:
        return name
    return f"{name}_{hashlib.sha256(json.dumps(concept.class_prompts).encode()).hexdigest()[:8]}"


def draw_missing(
    folder: Path,
    num_class_images: int,
    draw: Callable[[list[str], list[torch.Generator]], Sequence[Image.Image]],
    *,
    prompts: Sequence[str],
    origin: Mapping[str, Any],
    sample_batch_size: int,
    seed: int,
    accelerator: Any,
) -> None:
    """Draw images of a class into a folder until there are enough, each from a seed of its own.

    Every process calls this, and draws a part.

    Args:
        draw: draws an image from each prompt, with its generator.
        prompts: at least one, taken in turn; of several, each image's is written beside it.
        origin: all else that the images depend on.

    Raises:
        ValueError: the folder has images that were drawn otherwise.
    """
    file = folder / ORIGIN
    origin = {**origin, "class_prompt": prompts[0] if len(prompts) == 1 else [*prompts]}
    if file.is_file() and (changed := "; ".join(told(differences(read_mapping(file), dict(origin))))):
        raise ValueError(f"`class_data_dir` {str(folder)!r} has images drawn otherwise ({changed}): pass another one.")
    there = {path.name for path in folder.glob("[!.]*") if is_image(path)}
    names = {f"drawn_{index:04}.png": prompts[index % len(prompts)] for index in range(num_class_images)}
    missing = sorted(names.keys() - there)[: max(0, num_class_images - len(there))]
    accelerator.wait_for_everyone()
    if missing and accelerator.is_main_process:
        logger.info("Drawing %d images of %s", len(missing), shortened(repr(origin["class_prompt"]), 100))
        write_json(file, origin)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(mine), sample_batch_size):
        drawn = mine[start : start + sample_batch_size]
        images = draw([names[name] for name in drawn], [generator_for(seed, "class", name) for name in drawn])
        for name, image in zip(drawn, images, strict=True):
            if len(prompts) > 1:
                with whole_file((folder / name).with_suffix(".txt")) as temporary:
                    temporary.write_text(names[name], encoding="utf-8")
            with whole_file(folder / name) as temporary:
                image.save(temporary, format="PNG")
    accelerator.wait_for_everyone()
