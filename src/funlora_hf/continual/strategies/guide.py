"""GUIDE: replay in which the classifier steers its images towards its boundary with the new classes.

Source: GUIDE (arXiv 2403.03938): guided by the classifier in training [code for DDIM], the form for flow matching [ours].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...data.tasks import Task
from ...sampling.guidance import Guidance
from ...utils.checks import check_at_least_one
from ..base import label_rows
from ..strategy import Batch, Phase, Trainable
from ..trainer import phase_steps
from .generated_images import ReplayOptions, joined, share_of
from .replay import Replay, is_classifier


@dataclass
class GuideOptions(ReplayOptions):
    """
    Args:
        guidance_scale: s; 0 samples as `replay` does. GUIDE has 0.2 for CIFAR-10 in two tasks and 0.5 in five [code].
        refreshes: in how many rounds, evenly over the classifier's training, the images are drawn, each steered by the
            classifier as it then is [ours].
        largest_weight: of the guidance, which would be infinite at the noise [ours].

    The other options are those of `replay`.
    """

    guidance_scale: float = 0.2
    refreshes: int = 4
    largest_weight: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.guidance_scale >= 0:
            raise ValueError(f"`guidance_scale` is {self.guidance_scale}, expected a number of at least 0.")
        check_at_least_one("refreshes", self.refreshes)
        if not self.largest_weight > 0:
            raise ValueError(f"`largest_weight` is {self.largest_weight}, expected a number above 0.")


class Guide(Replay):
    """The generator is `replay`'s. The classifier is trained on images of past classes that the previous generator draws
    while this classifier pushes them towards the new class that it finds most likely. They keep the past class's label."""

    name = "guide"
    options_class = GuideOptions

    def replay_evaluations(self, task: Task) -> int:
        return 2 * super().replay_evaluations(task)  # for the generator, and guided ones for the classifier

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
    """Log-probability of each image's likeliest class among some.

    Args:
        classifier: to logits `(batch, classes)`.
        images: `(batch, channels, height, width)` in [-1, 1].
        rows: of the logits to choose among, `(n,)`, int64.

    Returns:
        `(batch,)`.
    """
    return classifier(images).log_softmax(dim=1)[:, rows.to(images.device)].max(dim=1).values
