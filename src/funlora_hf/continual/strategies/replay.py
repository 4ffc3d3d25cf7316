"""Generative replay: training on real images of new classes and on the previous generator's images of past classes.

Source: deep generative replay (Shin et al. 2017, arXiv 1705.08690) [text], with a flow model [ours]; distillation as in Masip et al.
2024 (arXiv 2311.14028) [code].
"""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch import nn

from ...data.tasks import Task
from ...flow_matching import interpolate, losses_at, sigma_to_timestep, velocity_target
from ..base import BASE_PHASE
from ..strategy import Batch, Phase, PhaseSettings, Setting, Trainable, folder_bytes
from .finetune import Finetune
from .generated_images import ReplayOptions
from .replaying import Replaying, is_classifier


class Replay(Replaying, Finetune):
    """Trains the whole U-Net, then a classifier, on real images of new classes mixed with generated images of past classes.

    Both start from their weights after the previous task.
    """

    name = "replay"
    options_class = ReplayOptions

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._teacher: UNet2DModel | None = None

    def phase_settings(self, task: Task) -> PhaseSettings:
        return self.scaled_to_seen(task)

    def build(self, phase: Phase) -> Trainable:
        if self.options.distillation and phase.name != BASE_PHASE and not is_classifier(phase):
            self._teacher = self.sampler(self.before(self.task_of(phase))).unet
        return super().build(phase)

    def training_step(self, phase: Phase, batch: Batch, module: nn.Module) -> torch.Tensor:
        if self._teacher is None:
            return super().training_step(phase, batch, module)
        rows, known = self.rows(phase, batch), self._teacher.config.num_class_embeds
        noisy = interpolate(batch.sample, batch.noise, batch.sigma, check_range=False)
        times = sigma_to_timestep(batch.sigma, check_range=False)
        with torch.no_grad():
            # Of the whole batch, since a size that varies is slow on a GPU: the answers for new classes are not used.
            taught = self._teacher(noisy, times, rows.clamp(max=known - 1), return_dict=False)[0]
        is_past = rows < known
        target = torch.where(is_past[:, None, None, None], taught, velocity_target(batch.sample, batch.noise))
        losses = losses_at(module, batch.sample, batch.noise, batch.sigma, rows, target)
        return torch.where(is_past, self.options.distillation, 1.0) * losses

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self._teacher = None

    def memory_report(self) -> dict[str, int]:
        report = super().memory_report()
        if self.options.distillation:
            report["transient"] += folder_bytes([self.setting.base_dir])  # the previous generator
        return report
