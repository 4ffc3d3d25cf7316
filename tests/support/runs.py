"""Short runs on a few digits, and what the tests of whole runs compare."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from peft import get_peft_model

from funlora_hf import FunLoraConfig, FunLoraPipeline
from funlora_hf.adapters.class_folder import adapter_name, save_adapter
from funlora_hf.continual.config import ARGUMENTS
from funlora_hf.run import RunArguments, run


REPOSITORY = Path(__file__).parents[2]
TINY_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "dropout": 0.1,
}
SHORT = {
    # data
    "max_images_per_class": 12,
    "classes_per_task": 4,
    # model
    "unet_config": TINY_UNET,
    # training
    "output_dir": "out",
    "base_train_steps": 12,
    "base_batch_size": 8,
    "adapter_train_steps": 8,
    "adapter_batch_size": 8,
    "checkpointing_steps": 3,
    # evaluation
    "num_samples_per_class": 6,
    "num_probe_samples": 2,
    "num_inference_steps": 2,
    "held_out_sigmas": 2,
    "classifier_epochs": 1,
}


def make_tiny_unet() -> UNet2DModel:
    """A U-Net of two classes whose forward takes milliseconds, always with the same weights."""
    torch.manual_seed(0)
    return UNet2DModel(**{**TINY_UNET, "dropout": 0.0, "num_class_embeds": 2}).eval()


def short_run(**overrides) -> RunArguments:
    """Arguments of a run of 4 + 4 + 2 digits with few steps; keyword arguments by the name of their field."""
    values = {**SHORT, **overrides}
    given = []
    for part in ARGUMENTS:
        fields = part.__dataclass_fields__
        given.append(part(**{name: values.pop(name) for name in list(values) if name in fields}))
    assert not values, f"no such arguments: {values}"
    return RunArguments(*given)


def run_in(folder: Path, **overrides) -> Path:
    """Run `short_run` inside a folder, on one thread; returns the folder of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        run(short_run(**overrides))
    return folder / SHORT["output_dir"]


def command_line(**overrides) -> list[str]:
    """The same for the example's command line."""
    arguments = []
    for name, value in {**SHORT, **overrides}.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None and value is not False:
            arguments += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def write_adapters(
    pipe: FunLoraPipeline, run: Path, *, classes: Sequence[int] = (2, 3), base: bool = True, **config
) -> Path:
    """The folder of a run with adapters that nobody trained but that are not at their start either; returns it."""
    if base:
        pipe.save_pretrained(run / "base")
    config = {"class_embedding": "class_embedding", "init_weights": False, **config}
    for class_id in classes:
        torch.manual_seed(class_id)
        name = adapter_name(class_id)
        model = get_peft_model(copy.deepcopy(pipe.unet), FunLoraConfig(**config), adapter_name=name)
        save_adapter(model, run / "adapters" / name, name)
    return run


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
