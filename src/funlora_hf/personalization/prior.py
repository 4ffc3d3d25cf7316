"""Pictures of a concept's class, for prior preservation: given, or drawn once by the base."""

from __future__ import annotations

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
from ..utils.files import read_mapping, whole_file, write_json
from ..utils.seeds import generator_for
from .concepts import Concept
from .pictures import load_images, pictures


logger = logging.getLogger(__name__)

# In the folder of drawn images: what they were drawn from.
ORIGIN = ".drawn.json"


@dataclass(frozen=True)
class Prior:
    """Pictures of classes, of which each batch has some.

    Args:
        images: id of a concept -> pictures of its class.
        loss_weight: weight of the mean of their losses.
        batch_size: how many are in a batch, over all processes; None: as many as pictures of concepts.
    """

    images: Mapping[int, Sequence[Path]]
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
) -> dict[int, tuple[Path, ...]]:
    """Return pictures of the class of each concept, `num_class_images` each; the base draws those that are missing.

    Every process calls this, and draws a part. Concepts with the same prompt of their class share its pictures.

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
    folders = {
        number: one.class_data_dir or folder / re.sub(r"[^\w-]+", "_", one.class_caption)[:64]
        for number, one in concepts.items()
    }
    for place in dict.fromkeys(folders.values()):
        if place.is_dir() and (there := pictures(place)):
            load_images(there[:num_class_images], size=8)
            if len(there) > num_class_images:
                logger.info("%s has %d pictures, of which the first %d are used", place, len(there), num_class_images)
    found = {}
    for number, place in folders.items():
        caption = concepts[number].class_caption

        def draw(generators: list[torch.Generator], caption: str = caption) -> list[Image.Image]:
            size = {"height": resolution, "width": resolution}
            return pipe([caption] * len(generators), generator=generators, **size, **options).images

        draw_missing(
            place,
            num_class_images,
            draw,
            origin={**origin, "class_prompt": caption, "resolution": resolution, "seed": seed, **options},
            sample_batch_size=sample_batch_size,
            seed=seed,
            accelerator=accelerator,
        )
        found[number] = pictures(place)[:num_class_images]
    return found


def draw_missing(
    folder: Path,
    num_class_images: int,
    draw: Callable[[list[torch.Generator]], Sequence[Image.Image]],
    *,
    origin: Mapping[str, Any],
    sample_batch_size: int,
    seed: int,
    accelerator: Any,
) -> None:
    """Draw images of a class into a folder until there are enough, each from a seed of its own.

    Every process calls this, and draws a part.

    Args:
        draw: draws an image with each generator.
        origin: all that the images depend on, `class_prompt` among it.

    Raises:
        ValueError: the folder has images that were drawn otherwise.
    """
    file = folder / ORIGIN
    if file.is_file() and (changed := "; ".join(told(differences(read_mapping(file), dict(origin))))):
        raise ValueError(f"`class_data_dir` {str(folder)!r} has images drawn otherwise ({changed}): pass another one.")
    there = {path.name for path in folder.glob("[!.]*") if is_image(path)}
    free = sorted({f"drawn_{index:04}.png" for index in range(num_class_images)} - there)
    missing = free[: max(0, num_class_images - len(there))]
    accelerator.wait_for_everyone()
    if missing and accelerator.is_main_process:
        logger.info("Drawing %d images of %r", len(missing), origin["class_prompt"])
        write_json(file, origin)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(mine), sample_batch_size):
        names = mine[start : start + sample_batch_size]
        images = draw([generator_for(seed, "class", name) for name in names])
        for name, image in zip(names, images, strict=True):
            with whole_file(folder / name) as temporary:
                image.save(temporary, format="PNG")
    accelerator.wait_for_everyone()
