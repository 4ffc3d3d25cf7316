"""A training step of FunLoRA on the paper's U-Net against one of other methods for the same 15 convolutions, batch 8.

The parameters that a class needs stand in brackets, its class vector included. LoRA of PEFT trains the vector as a row of
the class embedding (`trainable_token_indices`). LoHa and LoKr have no such setting: there the embedding is one row that
trains beside the adapter. The compiled and the eager form are FunLoRA with F by plain autograd; all else runs eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from backbone import adapted, paper_unet
from diffusers import UNet2DModel
from functional_matrix import plain
from interleaved import Comparison, Findings, Skipped, compare, main
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from training_step import step

from funlora_hf import functional_matrix, select_layers


class Rival(NamedTuple):
    """
    Args:
        name: of the method.
        make: a U-Net that trains by it.
        context: that its forward and backward run in.
    """

    name: str
    make: Callable[[], nn.Module]
    context: Callable[[], AbstractContextManager] = nullcontext


def measure() -> Findings:
    rivals = [
        Rival("LoRA of PEFT, r = 1", peft_lora),
        # Of LoKr's and LoHa's settings those whose number of parameters is nearest to FunLoRA's.
        Rival("LoKr of lycoris-lora, r = 3", lycoris_lokr),
        Rival("LoKr of PEFT, r = 3", partial(of_peft, LoKrConfig, r=3, alpha=3)),
        Rival("LoHa of PEFT, r = 1, Tucker", partial(of_peft, LoHaConfig, r=1, alpha=1, use_effective_conv2d=True)),
        Rival("all weights", paper_unet),
        Rival("FunLoRA, F by torch.compile", compiled_funlora, partial(functional_matrix_by, compiled())),
        Rival("FunLoRA, F by plain autograd", funlora, partial(functional_matrix_by, plain)),
    ]
    rows, skipped = [], []
    for rival in rivals:
        try:
            rows.append(against(rival))
        except (ImportError, CompilerMissingError) as error:
            skipped.append(Skipped(rival.name, str(error).splitlines()[0]))
    return Findings(rows, skipped)


def against(rival: Rival, size: int = 8) -> Comparison:
    """Forward, backward and an update by Adam."""
    ours, theirs = funlora(), rival.make()
    sides = {"FunLoRA": step(ours, size), rival.name: step(theirs, size, rival.context)}
    return compare(f"FunLoRA ({trained(ours):,}) / {rival.name} ({trained(theirs):,})", sides, rounds=5)


def trained(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def funlora() -> nn.Module:
    return adapted(paper_unet(), "x")


def peft_lora() -> nn.Module:
    unet = paper_unet()
    targets = select_layers(unet)
    return get_peft_model(
        unet, LoraConfig(r=1, lora_alpha=1, target_modules=targets, trainable_token_indices={"class_embedding": [0]})
    )


def of_peft(config: type[LoKrConfig] | type[LoHaConfig], **settings: object) -> nn.Module:
    unet = with_class_vector(paper_unet())
    model = get_peft_model(unet, config(target_modules=select_layers(unet), **settings))
    unet.class_embedding.requires_grad_(True)
    return model


def lycoris_lokr() -> nn.Module:
    # Imported here, as the other rows do without it.
    from lycoris import create_lycoris

    unet = with_class_vector(paper_unet())
    unet.requires_grad_(False)
    unet.class_embedding.requires_grad_(True)
    layers = nn.ModuleList(unet.get_submodule(name) for name in select_layers(unet))
    network = create_lycoris(layers, linear_dim=3, linear_alpha=3, algo="lokr")
    network.apply_to()
    unet.lycoris = network
    return unet


def with_class_vector(unet: UNet2DModel) -> UNet2DModel:
    """The U-Net with the mean of its class embedding's rows as the only row, where FunLoRA's vector starts."""
    rows = unet.class_embedding.weight.detach()
    unet.class_embedding = nn.Embedding.from_pretrained(rows.mean(dim=0, keepdim=True))
    return unet


def compiled_funlora() -> nn.Module:
    """FunLoRA, once it is known that torch can compile here."""
    shapes = (256, 1), (1, 512), (10,), (10,)
    try:
        compiled()(*(torch.ones(shape, requires_grad=True) for shape in shapes), function="cosine").sum().backward()
    except RuntimeError as error:
        raise CompilerMissingError(f"torch.compile fails here: {error}") from error
    return funlora()


class CompilerMissingError(Exception):
    """torch cannot compile on this machine."""


def compiled() -> Callable[..., torch.Tensor]:
    """F by torch.compile: a kernel for each shape, which is faster than one for all."""
    return torch.compile(functional_matrix, dynamic=False)


@contextmanager
def functional_matrix_by(compute: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Layers compute F by another function."""
    with patch("funlora_hf.tuner.layer.functional_matrix", compute):
        yield


if __name__ == "__main__":
    main(__doc__, measure, __file__)
