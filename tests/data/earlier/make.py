"""Writes the adapters and outputs in this folder: `python tests/data/earlier/make.py`, run once with the code of commit 59edb47.

They pin what an adapter on disk means: code that reads them must give the same outputs. Never write them again with later code.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from peft import get_peft_model
from safetensors.torch import save_file

from funlora_hf import FunLoraConfig, FunLoraPipeline


HERE = Path(__file__).parent
DIGITS = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "num_class_embeds": 2,
}
# Its decoder has convolutions from 512 to 256 channels.
WIDE = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (256,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
    "num_class_embeds": 2,
}
KINDS = {
    "cosine": {},
    "power": {"function": "power", "num_functions": 5},
    "shift": {"function": "shift"},
    "r2": {"r": 2, "operation": "mul-add", "ratio": 2},
}
UNETS = {"digits": DIGITS, "wide": WIDE}


def make_base(config: dict) -> UNet2DModel:
    """A U-Net whose weights come from NumPy's generator, which gives the same numbers everywhere."""
    unet = UNet2DModel(**config).eval()
    numbers = np.random.RandomState(0)
    for name, parameter in sorted(unet.named_parameters()):
        spread = 0.5 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        values = spread * numbers.standard_normal(tuple(parameter.shape))
        values += "norm" in name and name.endswith("weight")
        parameter.data.copy_(torch.from_numpy(values))
    return unet


def draw(unet_name: str, folders: list[Path]) -> torch.Tensor:
    """Two images of each adapter and one of the base, `(2 * adapters + 1, 1, 8, 8)`, one class after another."""
    pipe = FunLoraPipeline(make_base(UNETS[unet_name]), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    labels = [pipe.load_adapter(folder) for folder in folders]
    noise = torch.Generator().manual_seed(0)
    return pipe([0, *labels, *labels], num_inference_steps=2, generator=noise, output_type="pt").images


def write() -> None:
    for unet_name in UNETS:
        for label, (kind, changes) in enumerate(KINDS.items(), start=2):
            torch.manual_seed(label)
            config = FunLoraConfig(class_embedding="class_embedding", class_label=label, init_weights=False, **changes)
            model = get_peft_model(make_base(UNETS[unet_name]), config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "_omega" in name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(HERE / unet_name / kind)
            (HERE / unet_name / kind / "README.md").unlink()
        folders = [HERE / unet_name / kind for kind in KINDS]
        save_file({"images": draw(unet_name, folders)}, HERE / unet_name / "images.safetensors")


if __name__ == "__main__":
    write()
