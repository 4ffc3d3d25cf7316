"""DDGR: replay whose images of past classes are drawn under the guidance of the classifier that the previous task trained.

Source: Gao and Liu, ICML 2023 [code: py-DDGR1.1 of xiaocangshengGR/DDGR, for DDPM]; its form for flow matching is [ours].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import nn

from ...data.tasks import Task
from ...sampling.guidance import GUIDED_AT, Guidance
from ...sampling.pipeline import FunLoraPipeline
from ...utils.field_types import Positive, Range, one_of
from .generated_images import ReplayOptions
from .replay import Replay


@dataclass
class DdgrOptions(ReplayOptions):
    """
    Args:
        guidance_scale: s; 0 draws what `replay` draws.
        guided_at: where the classifier looks: "estimate" at the estimated image, "state" at the noisy one, as DDGR's [code].
        largest_weight: limit of the guidance's weight, which would be infinite at the noise [ours].

    The other options are those of `replay`.
    """

    guidance_scale: Annotated[float, Range(0)] = 1.0
    guided_at: Annotated[str, one_of(*GUIDED_AT)] = "estimate"
    largest_weight: Positive = 10.0


class Ddgr(Replay):
    """Trains generator and classifier as `replay` does, on images of past classes that the previous classifier finds typical."""

    name = "ddgr"
    options_class = DdgrOptions

    def check(self) -> None:
        super().check()
        images = self.setting.num_images
        missing = [class_id for class_id in self.setting.tasks[0].class_ids if not images.get(class_id)]
        if missing:
            raise ValueError(
                f"`strategy` 'ddgr' guides the drawing by a classifier that task 1 trains on real images, but the dataset has none of the "
                f"classes {missing} of `base_model`: add them to the dataset, or use `strategy` 'replay'."
            )

    def replay_evaluations(self, task: Task) -> int:
        # Guidance at the estimate adds a backward pass, which costs about as much as an evaluation.
        return super().replay_evaluations(task) * (2 if self.options.guided_at == "estimate" else 1)

    def draw_past(self, pipe: FunLoraPipeline, task: Task) -> dict[int, torch.Tensor]:
        options, drawn = self.options, dict[int, torch.Tensor]()
        previous = self.setting.tasks[task.index - 1]
        classifier = self._classifier(previous, previous).eval().requires_grad_(False)
        for row, (class_id, count) in enumerate(self.past(task).items()):
            score = partial(log_probability, classifier, row)
            guidance = Guidance(score, options.guidance_scale, options.largest_weight, options.guided_at)
            # The purpose is replay's, so that the noise is, too.
            drawn |= self.images.draw(pipe, {class_id: count}, f"replay_{task.index + 1}", guidance=guidance)
        return drawn


def log_probability(classifier: nn.Module, row: int, images: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of one class for each image, `(batch,)`; `row` is the class's row of the logits."""
    return classifier(images).log_softmax(dim=1)[:, row]
