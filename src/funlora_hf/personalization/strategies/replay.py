"""Generative replay: one LoRA that learns each concept beside pictures of earlier ones, which the previous model draws.

Source: deep generative replay (Shin et al. 2017, arXiv 1705.08690) [text]; its form for concepts of a text-to-image model [ours].
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from accelerate import PartialState
from PIL import Image

from ...continual.learning import Phase
from ...continual.strategies.merging_rules import RuleOptions
from ...data.tasks import Task
from ...utils.field_types import Count, Range
from ...utils.files import remove_folder, whole_folder
from ..arguments import ConceptEvaluationArguments
from ..drawing import draw
from .base import ConceptSetting, Rates, scaled
from .one_model import NaiveLora


logger = logging.getLogger(__name__)


@dataclass
class ReplayOptions(RuleOptions):
    """
    Args:
        images_per_concept: pictures drawn of every earlier concept before a task.
        num_inference_steps: steps of the pipeline's scheduler for each.
        guidance_scale: of classifier-free guidance; 1: none.
        sampling_batch_size: pictures drawn at once.
        scale_steps: the steps of a task grow with the concepts seen, so that each of them, old or new, is seen as often as a concept
            of the first task; False: every task has as many steps.
    """

    images_per_concept: Count = 48
    num_inference_steps: Count = ConceptEvaluationArguments.num_inference_steps
    guidance_scale: Annotated[float, Range(1, 100)] = ConceptEvaluationArguments.guidance_scale
    sampling_batch_size: Count = ConceptEvaluationArguments.sampling_batch_size
    scale_steps: bool = True


class Replay(NaiveLora):
    """Trains one LoRA further in every task, on the task's pictures and on drawn pictures of each earlier concept, in equal shares.

    Real pictures of earlier concepts are never read, and the rows of their tokens stay as they are.
    """

    name, options_class = "replay", ReplayOptions
    rates = Rates(1.35e-2, 1e-5)

    def __init__(self, setting: ConceptSetting) -> None:
        super().__init__(setting)
        self.drawn_dir = setting.output_dir / "checkpoints" / "replay"

    def phases(self, task: Task) -> list[Phase]:
        own = len(task.class_ids)
        concepts = len(self.setting.seen(task)) if self.options.scale_steps else own
        settings = scaled(self.phase_settings(), concepts)
        if settings.epochs is not None:
            # An epoch counts only real pictures.
            settings = replace(settings, epochs=-(-settings.epochs * concepts // own))
        return [Phase(f"task_{task.index + 1}", task.class_ids, settings, independent=False)]

    def begin_task(self, task: Task) -> None:
        """Draw what is missing; each process draws other concepts."""
        if all(self.is_finished(phase) for phase in self.phases(task)):
            return
        state = PartialState()
        mine = self.setting.past(task)[state.process_index :: state.num_processes]
        # A concept is drawn as a whole, since the size of a batch may change bits.
        if missing := [class_id for class_id in mine if not self._folder(task, class_id).is_dir()]:
            with self.sampling() as pipe:
                for class_id in missing:
                    self._draw(pipe, task, class_id)

    def replayed(self, phase: Phase) -> Mapping[int, Mapping[Path, str]]:
        task = self.task_of(phase)
        return {class_id: self._pictures(task, class_id) for class_id in self.setting.past(task)}

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        remove_folder(self.drawn_dir)

    def memory_report(self) -> dict[str, int]:
        report = super().memory_report()
        # Of the last task, which has the most, as uint8.
        pictures = len(self.setting.past(self.setting.tasks[-1])) * self.options.images_per_concept
        report["transient"] += pictures * 3 * self._resolution**2
        return report

    @property
    def _resolution(self) -> int:
        return self.setting.arguments.resolution or self.model.resolution

    def _folder(self, task: Task, class_id: int) -> Path:
        return self.drawn_dir / f"task_{task.index + 1}" / self.setting.concepts[class_id].name

    def _pictures(self, task: Task, class_id: int) -> dict[Path, str]:
        """Return the paths of what is drawn of a concept, with their captions: those of its real pictures, in turn."""
        concept, folder = self.setting.concepts[class_id], self._folder(task, class_id)
        captions = [concept.caption(path) for path in concept.images]
        count = self.options.images_per_concept
        return {folder / f"{index:05}.png": captions[index % len(captions)] for index in range(count)}

    def _draw(self, pipe: Any, task: Task, class_id: int) -> None:
        options, name = self.options, self.setting.concepts[class_id].name
        pictures = self._pictures(task, class_id)
        logger.info("Drawing %d images of %s", len(pictures), name)
        images = draw(
            pipe,
            list(pictures.values()),
            1,
            purpose=f"replay {task.index + 1} {name}",
            seed=self.setting.training.seed,
            resolution=self._resolution,
            config=ConceptEvaluationArguments(
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                sampling_batch_size=options.sampling_batch_size,
            ),
        )
        with whole_folder(self._folder(task, class_id)) as temporary:
            for path, image in zip(pictures, images, strict=True):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary / path.name)
