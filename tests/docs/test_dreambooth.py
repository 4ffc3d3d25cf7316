"""The Python of docs/guides/dreambooth.md: in the calls of diffusers' own scripts into PEFT, diffusers and accelerate, in their order."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from runs import REPOSITORY
from text_to_image import make_pipeline, sample

from funlora_hf import BaseMismatchError, save_adapter


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
TEXT = (REPOSITORY / "docs" / "guides" / "dreambooth.md").read_text(encoding="utf-8")
OF_OUR_SCRIPT, *FUNLORA = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
# What they do for LoRA at the places of the page's blocks: import, add, hooks, save, load.
LORA = [
    "",
    'unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))',
    """
def save_model_hook(models, weights, output_dir):
    for model in models:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unwrap_model(model)))
        StableDiffusionLoraLoaderMixin.save_lora_weights(output_dir, unet_lora_layers=layers)
        weights.pop()


def load_model_hook(models, input_dir):
    tensors, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(input_dir)
    tensors = {key.removeprefix("unet."): tensor for key, tensor in tensors.items()}
    set_peft_model_state_dict(models.pop(), convert_unet_state_dict_to_peft(tensors), adapter_name="default")
""",
    """
unet = unwrap_model(unet).to(torch.float32)
layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
StableDiffusionLoraLoaderMixin.save_lora_weights(args.output_dir, unet_lora_layers=layers)
""",
    'pipeline.load_lora_weights(args.output_dir, weight_name="pytorch_lora_weights.safetensors")',
]
METHODS = {"LoRA": LORA, "FunLoRA": FUNLORA}
CALLS = (
    StableDiffusionLoraLoaderMixin,
    LoraConfig,
    convert_state_dict_to_diffusers,
    convert_unet_state_dict_to_peft,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    make_pipeline("SD").save_pretrained(folder)
    return str(folder)


class Script:
    """
    One of the scripts with the lines of a method.

    Args:
        name: "train_dreambooth_lora.py", or "train_text_to_image_lora.py", which registers its hooks later.
        lines: of the method, as on the page.
        precision: of the base.
    """

    def __init__(self, name: str, lines: list[str], base: str, output_dir: Path, precision: str = "no") -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.base, self.lines, self.dtype = base, lines, torch.bfloat16 if precision == "bf16" else torch.float32
        self.accelerator = accelerator = Accelerator(mixed_precision=precision)
        self.noise = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        unet.requires_grad_(False)
        unet.to(accelerator.device, dtype=self.dtype)
        self.names: dict[str, Any] = {
            **{one.__name__: one for one in CALLS},
            **{"os": os, "torch": torch, "accelerator": accelerator, "unet": unet},
            "unwrap_model": accelerator.unwrap_model,
            "args": SimpleNamespace(output_dir=str(output_dir)),
        }
        self.run(0, 1)
        if name == "train_dreambooth_lora.py":
            self._register_hooks()
        cast_training_params([unet], dtype=torch.float32)
        self.trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        torch.manual_seed(0)
        for parameter in self.trained if lines is LORA else ():  # one factor of LoRA starts at 0
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        optimizer = torch.optim.AdamW(self.trained, lr=1e-2, weight_decay=0)
        scheduler = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=6)
        prepared = accelerator.prepare(unet, optimizer, scheduler)
        self.names["unet"], self.optimizer, self.scheduler = prepared
        if name != "train_dreambooth_lora.py":
            self._register_hooks()

    def run(self, *blocks: int) -> None:
        for block in blocks:
            exec(self.lines[block], self.names)

    def loss(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        latents, noise = (torch.randn(4, 4, 8, 8, generator=generator).to(self.dtype) for _ in range(2))
        states = torch.randn(4, 8, 16, generator=generator).to(self.dtype)
        times = torch.randint(1000, (4,), generator=generator)
        noisy = self.noise.add_noise(latents, noise, times)
        output = self.names["unet"](noisy, times, states, return_dict=False)[0]
        return torch.nn.functional.mse_loss(output.float(), noise.float())

    def train(self, steps: range) -> None:
        unet = self.names["unet"]
        unet.train()
        for step in steps:
            with self.accelerator.accumulate(unet):
                self.accelerator.backward(self.loss(step % 2))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def pipeline(self, **parts: Any) -> Any:
        pipe = DiffusionPipeline.from_pretrained(self.base, **parts).to(self.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def loaded(self) -> Any:
        """A new pipeline with what was saved."""
        self.names["pipeline"] = self.pipeline()
        self.run(4)
        return self.names["pipeline"]

    def _register_hooks(self) -> None:
        self.run(2)
        self.accelerator.register_save_state_pre_hook(self.names["save_model_hook"])
        self.accelerator.register_load_state_pre_hook(self.names["load_model_hook"])


def draw(pipe: Any) -> torch.Tensor:
    with torch.autocast("cpu", enabled=pipe.dtype != torch.float32):
        return sample(pipe)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["train_dreambooth_lora.py", "train_text_to_image_lora.py"])
def test_diffusers_scripts(name, method, base, tmp_path):
    def script() -> Script:
        return Script(name, METHODS[method], base, tmp_path)

    whole = script()
    before = whole.loss(0).item() + whole.loss(1).item()
    whole.train(range(3))
    whole.accelerator.save_state(str(tmp_path / "checkpoint-3"))
    assert not list((tmp_path / "checkpoint-3").glob("model*"))
    whole.train(range(3, 6))
    assert whole.loss(0).item() + whole.loss(1).item() < before
    drawn = draw(whole.pipeline(unet=whole.accelerator.unwrap_model(whole.names["unet"])))
    assert (drawn - draw(whole.pipeline())).abs().max() > 1e-3

    resumed = script()
    resumed.accelerator.load_state(str(tmp_path / "checkpoint-3"))
    resumed.train(range(3, 6))
    for one, other in zip(whole.trained, resumed.trained, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    resumed.run(3)
    torch.testing.assert_close(draw(resumed.loaded()), drawn, rtol=0, atol=1e-5)


def test_a_base_in_half_precision(base, tmp_path):
    script = Script("train_dreambooth_lora.py", FUNLORA, base, tmp_path, "bf16")
    script.train(range(3))
    unet = script.accelerator.unwrap_model(script.names["unet"], keep_fp32_wrapper=False)
    drawn = draw(script.pipeline(unet=unet))
    script.run(3)
    torch.testing.assert_close(draw(script.loaded()), drawn, rtol=0, atol=1e-5)
    # The line that the page has you leave out.
    save_adapter(unet.to(torch.float32), tmp_path / "adapter")
    script.dtype = torch.float32
    with pytest.raises(BaseMismatchError):
        script.loaded()


def test_what_our_script_writes(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.save_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    script = Script("train_dreambooth_lora.py", FUNLORA, base, Path("outputs/sks_dog"))
    script.run(3)
    exec(OF_OUR_SCRIPT, {})
