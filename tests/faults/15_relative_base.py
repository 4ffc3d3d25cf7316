"""An adapter trained with --base_model mybase (a relative path) names its base "mybase/unet"; seen from another folder, that is a repository of
a stranger called "mybase", which is asked for, and which a push puts into the config and the card.

Right: an absolute path, or no name at all; read_adapter_folder(...).base_on_hub is Base(None), from whatever folder."""

import sys
import tempfile
import warnings

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

from funlora_hf import FunLoraConfig, FunLoraPipeline

warnings.filterwarnings("ignore")


def small_unet(seed=0, **kwargs):
    torch.manual_seed(seed)
    arguments = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"), "num_class_embeds": 2,
    }
    return UNet2DModel(**{**arguments, **kwargs}).eval()


def save_adapter(folder, label, seed):
    from peft import get_peft_model
    unet = small_unet()
    torch.manual_seed(seed)
    config = FunLoraConfig(class_embedding="class_embedding", class_label=label, class_name=f"c{label}", init_weights=False)
    get_peft_model(unet, config).save_pretrained(folder)
    return folder


def pipeline(unet=None, **kwargs):
    pipe = FunLoraPipeline(small_unet() if unet is None else unet, FlowMatchEulerDiscreteScheduler(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels, **kwargs):
    kwargs = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt", **kwargs}
    return pipe(labels, **kwargs).images



import json
import os
from pathlib import Path

from funlora_hf.continual.existing_base import find_base
from funlora_hf.hub.what_to_push import read_adapter_folder

work = Path(tempfile.mkdtemp())
(work / "there").mkdir()
os.chdir(work)
pipeline().save_pretrained(work / "mybase")
source = find_base("mybase").source  # what a run writes into each adapter
print("base_model_name_or_path of a run with --base_model mybase:", source)
folder = Path(save_adapter(work / "adapters/class_7", 7, 7))
config = json.loads((folder / "adapter_config.json").read_text())
config["base_model_name_or_path"] = source
(folder / "adapter_config.json").write_text(json.dumps(config))
os.chdir(work / "there")
base = read_adapter_folder(folder).base_on_hub
print("base on the Hub, seen from another folder:", base, "(right: base=None)")
sys.exit(int(base.base is not None))
