"""GUIDE: replay in which the classifier steers the images towards its boundary with the new classes.

Source: GUIDE (arXiv 2403.03938): guidance by the classifier in training [code for DDIM], its form for flow matching [ours].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from ...data.tasks import Task
from ...sampling.guidance import Guidance
from ...utils.field_types import Count, Positive, Range
from ..base import label_rows
from ..strategy import Batch, Phase, Trainable
from ..trainer import phase_steps
from .generated_images import ReplayOptions, joined, share_of
from .replay import Replay, is_classifier


@dataclass
class GuideOptions(ReplayOptions):
    """
    Args:
        guidance_scale: s; 0 samples as `replay` does. GUIDE uses 0.2 for CIFAR-10 in two tasks and 0.5 in five [code].
        refreshes: number of rounds in which the images are drawn, evenly over the classifier's training; each is steered by
            the classifier of that moment [ours].
        largest_weight: limit of the guidance's weight, which would be infinite at the noise [ours].

    The other options are those of `replay`.
    """

    guidance_scale: Annotated[float, Range(0)] = 0.2
    refreshes: Count = 4
    largest_weight: Positive = 10.0


class Guide(Replay):
    """Trains the generator as `replay` does, and the classifier on images of past classes that the previous generator draws
    while this classifier pushes them towards the new class that it finds most likely. They keep the label of the past class."""

    name = "guide"
    options_class = GuideOptions

    def replay_evaluations(self, task: Task) -> int:
        # Images for the generator, and guided ones for the classifier, whose backward passes cost about as much as evaluations.
        return 3 * super().replay_evaluations(task)

    def build(self, phase: Phase) -> Trainable:
        trainable = super().build(phase)
        if is_classifier(phase):
            self._live = trainable.module
            self._rounds: list[dict[int, torch.Tensor]] = []
        return trainable

    def generated(self, phase: Phase, real: Batch) -> Mapping[int, torch.Tensor]:
        task = self.task_of(phase)
        if not is_classifier(phase) or task.index == 0:
            return super().generated(phase, real)
        training, refreshes = self.setting.training, self.options.refreshes
        batches = phase_steps(phase.settings, 0, training) * training.gradient_accumulation_steps
        due = min(refreshes, 1 + real.number * refreshes // batches)
        while len(self._rounds) < due:
            self._rounds.append(self._draw(phase, len(self._rounds)))
            self._joined = joined(self._rounds)
        return self._joined

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        if is_classifier(phase):
            del self._live
            self._rounds, self._joined = [], {}

    def _replay_bytes(self) -> int:
        # One set for the generator, one for the classifier.
        return 2 * super()._replay_bytes()

    def _draw(self, phase: Phase, number: int) -> dict[int, torch.Tensor]:
        task = self.task_of(phase)
        counts = share_of(self.past(task), number, self.options.refreshes)
        new = label_rows(self.setting.seen(task), torch.tensor(task.class_ids))
        guidance = Guidance(
            lambda images: likeliest(self._live, images, new), self.options.guidance_scale, self.options.largest_weight
        )
        pipe = self.sampler(self.before(task))
        self._live.eval()
        try:
            return self.images.draw(pipe, counts, f"guided_{task.index + 1}_{number}", guidance=guidance)
        finally:
            self._live.train()


def likeliest(classifier: nn.Module, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each image's likeliest class among some classes, `(batch,)`.

    Args:
        classifier: from images to logits `(batch, classes)`.
        images: `(batch, channels, height, width)` in [-1, 1].
        rows: rows of the logits to choose from, `(n,)`, int64.
    """
    return classifier(images).log_softmax(dim=1)[:, rows.to(images.device)].max(dim=1).values
