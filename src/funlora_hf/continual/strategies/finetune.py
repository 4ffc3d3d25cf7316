"""The lower bound: all weights of the generator, trained on task after task.

Source: arXiv 2510.02631 and 2410.04891, sequential fine-tuning [text].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DModel

from ..base import BASE_PHASE, arrange
from ..strategy import Phase, Trainable, folder_bytes
from .all_weights import AllWeights
from .sequential import CLASS_VECTORS, Sequential


class Finetune(AllWeights, Sequential):
    """Trains the whole U-Net on each task's images, at the base's learning rate, and forgets past classes."""

    name = "finetune"
    prefix = "base"
    needs_base = False

    def build(self, phase: Phase) -> Trainable:
        trainable = super().build(phase)
        if phase.name != BASE_PHASE:
            weights = {name: one for name, one in trainable.parameters.items() if name != CLASS_VECTORS}
            self.protect(phase, trainable, weights)
        return trainable

    def trainable(self, unet: UNet2DModel, kept: Mapping[str, torch.Tensor]) -> Trainable:
        self.load(unet, kept)
        arrange(unet, self.setting.training, compiled=self.setting.training.torch_compile)
        return Trainable(unet, dict(unet.named_parameters()))

    def learned(self, trainable: Trainable, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return trainable.module.state_dict()

    def load(self, unet: UNet2DModel, kept: Mapping[str, torch.Tensor]) -> None:
        if kept:
            unet.load_state_dict({CLASS_VECTORS: unet.get_parameter(CLASS_VECTORS), **kept})

    def trained_bytes(self, base: int) -> int:
        return base

    def memory_report(self) -> dict[str, int]:
        report = super().memory_report()
        return {**report, "transient": report["transient"] + self.copies * folder_bytes([self.setting.base_dir])}
