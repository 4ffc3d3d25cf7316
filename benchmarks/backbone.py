"""The paper's CIFAR U-Net with random weights, and adapters on its 15 convolutions: what the benchmarks run on."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from peft import PeftModel, get_peft_model

from funlora_hf import FunLoraConfig, select_layers
from funlora_hf.recipes.reading import find_recipe, load_yaml


def paper_unet() -> UNet2DModel:
    """35.75M parameters (arXiv 2510.02631; ten classes)."""
    recipe = load_yaml(find_recipe("cifar10_2-2").read_text(encoding="utf-8"))
    return UNet2DModel(**recipe["unet_config"], num_class_embeds=10)


def config(**changes: object) -> FunLoraConfig:
    """The default adapter with factors as training leaves them, about 0.1 from where they started."""
    return FunLoraConfig(class_embedding="class_embedding", init_weights=False, **changes)


def adapted(unet: UNet2DModel, *names: str, **changes: object) -> PeftModel:
    """The U-Net with an adapter for every name; the first is active."""
    first, *others = names
    model = get_peft_model(unet, config(**changes), adapter_name=first)
    for name in others:
        model.add_adapter(name, config(**changes))
    return model


def floor(unet: UNet2DModel) -> UNet2DModel:
    """The U-Net with the weights of the 15 convolutions and the class embedding trainable, and no adapter.

    FunLoRA's gradient goes through those of these weights, so no adapter of its kind can need less.
    """
    unet.requires_grad_(False)
    for name in select_layers(unet):
        unet.get_submodule(name).weight.requires_grad_(True)
    unet.class_embedding.requires_grad_(True)
    return unet


def batch(size: int) -> dict[str, torch.Tensor]:
    """Random inputs."""
    return {
        "sample": torch.randn(size, 3, 32, 32),
        "timestep": 1000 * torch.rand(size),
        "class_labels": torch.zeros(size, dtype=torch.long),
    }
