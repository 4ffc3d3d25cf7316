"""Teaches a frozen base one more class: from image files to an adapter, in a plain loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from peft import PeftModel, get_peft_model
from PIL import Image, ImageDraw, UnidentifiedImageError

from funlora_hf import FunLoraConfig
from funlora_hf.data.pixels import to_array
from funlora_hf.data.untrusted_images import decode_image
from funlora_hf.flow_matching import training_loss


MOST_IMAGES = 200
# What a user may take of a machine that several share.
MOST_SECONDS = 60.0
BATCH_SIZE = 32
# At the first step; it falls to 0 at the last.
LEARNING_RATE = 2e-2


def read_images(files: Sequence[str], unet: UNet2DModel) -> torch.Tensor:
    """
    Images as a base takes them, cut to its shape and scaled as the training data of a run are.

    Args:
        files (`Sequence[str]`): names of image files.
        unet (`UNet2DModel`): the base, of square images, grey or in colour.

    Returns:
        uint8 `(N, channels, height, width)`, range 0..255.

    Raises:
        ValueError: no file, too many, one that is no image (the message names it), or a base of other images.
    """
    size, channels = unet.config["sample_size"], unet.config["in_channels"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width or channels not in (1, 3):
        raise ValueError(f"The base makes {channels} x {height} x {width}, expected square images of 1 or 3 channels.")
    if not 1 <= len(files) <= MOST_IMAGES:
        raise ValueError(f"There are {len(files)} images, expected 1 to {MOST_IMAGES}: drop some into the field.")
    pixels = []
    for file in map(Path, files):
        try:
            image = decode_image({"path": os.fspath(file)}, roots=[os.fspath(file.parent)])
            pixels.append(to_array(image, size=height, channels=channels))
        except Exception as error:  # Pillow's decoders raise many types
            why = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{file.name!r} is not an image that can be read: {why}. Leave it out.") from error
    return torch.from_numpy(np.stack(pixels))


def teach(
    unet: UNet2DModel,
    images: torch.Tensor,
    config: FunLoraConfig,
    *,
    steps: int,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[PeftModel, int]:
    """
    Train the adapter of a class; the base's own weights stay as they are.

    Args:
        unet (`UNet2DModel`): the base, whose layers are wrapped.
        images (`torch.Tensor`): of the class, from `read_images`.
        config (`FunLoraConfig`): of the adapter.
        steps (`int`): most steps. After a minute it ends with fewer.
        seed (`int`): equal seeds give equal adapters.
        on_step (`Callable`, *optional*): gets the number of each step that is done.

    Returns:
        `tuple[PeftModel, int]`: the model with the adapter, and the number of steps.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(unet, config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0)
    sample = (images / 127.5 - 1).to(unet.device)
    # The adapter's own vector takes the place of any row of the class embedding.
    labels = None if config.class_embedding is None else torch.zeros(BATCH_SIZE, dtype=torch.int64)
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - done)
        batch = sample[torch.randint(len(sample), (BATCH_SIZE,), generator=generator)]
        loss = training_loss(model, batch, labels, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        on_step(step)
        done = max(step / steps, (time.monotonic() - start) / MOST_SECONDS)
    return model.eval(), step


def draw_hearts(folder: Path, count: int = 12) -> list[str]:
    """Hearts, white on black, of different size and place, to try the page with; returns the names of the files."""
    random = np.random.RandomState(0)
    files = []
    for number in range(1, count + 1):
        x, y, r = random.uniform(28, 36), random.uniform(28, 36), random.uniform(18, 26)
        image = Image.new("L", (64, 64))
        draw = ImageDraw.Draw(image)
        draw.polygon([(x - r, y - r / 3), (x, y + r), (x + r, y - r / 3)], "white")
        draw.ellipse((x - r, y - r, x, y), "white")
        draw.ellipse((x, y - r, x + r, y), "white")
        files.append(os.fspath(folder / f"heart_{number}.png"))
        image.save(files[-1])
    return files
