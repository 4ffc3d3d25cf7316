"""An adapter name that torch refuses (with a dot) is left behind in the first layer when it is added to a model that has adapters; mixed_batch takes it
then, and the forward fails with an AttributeError.

Right: a ValueError or KeyError, and no layer knows the name; mixed_batch refuses it."""

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



from peft import PeftModel

from funlora_hf import mixed_batch
from funlora_hf.tuner_base.layer import adapter_layers

model = PeftModel.from_pretrained(small_unet(), save_adapter(tempfile.mkdtemp(), 7, 7)).eval()
try:
    model.add_adapter("a.b", FunLoraConfig(class_embedding="class_embedding"))
    print("taken")
except (KeyError, ValueError) as error:
    print(f"refused: {type(error).__name__}: {error}")
left = sum("a.b" in layer.settings for layer in adapter_layers(model))
try:
    with mixed_batch(model, ["a.b"]), torch.no_grad():
        model(torch.ones(1, 1, 8, 8), torch.tensor(500.0), torch.tensor([0]))
    ran = "ran"
except ValueError:
    ran = "refused"
except AttributeError as error:
    ran = f"AttributeError: {error}"
print(f"layers that know the name: {left} (right: 0); a batch for it: {ran} (right: refused)")
sys.exit(int(left > 0 or ran != "refused"))
