"""Log after each task of a run: what was learned, how well, and how long the rest will take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import fmean

from ..continual.base import BASE_PHASE
from ..continual.trainer import per_task, phase_images, phase_seconds, preparation_seconds
from ..data.tasks import Task
from ..utils.progress import duration
from .evaluator import RunEvaluator


logger = logging.getLogger(__name__)

# Further class names are only counted.
_MOST_NAMES = 10


class TaskLog:
    """Logs a line after each task, from the files of the run; the evaluator has already evaluated the task."""

    def __init__(self, evaluator: RunEvaluator) -> None:
        self.evaluator = evaluator
        self.setting, self.folder = evaluator.strategy.setting, evaluator.folder

    def end_task(self, task: Task) -> None:
        """Log the line, on the main process."""
        if not self.evaluator.accelerator.is_main_process:
            return
        tasks, prepared = self.setting.tasks, preparation_seconds(self.folder)
        # Of all processes, preparation included.
        spent = per_task(phase_seconds(self.folder), "seconds", [prepared.get(one.index, 0.0) for one in tasks])
        names = [self.setting.class_names[class_id] for class_id in task.class_ids]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        how = (
            "of the base" if task.index == 0 and self.setting.has_base else f"learned in {duration(spent[task.index])}"
        )
        row = (self.evaluator.records()[task.index] or {}).get("accuracies")
        accuracy = "" if row is None else f", accuracy {fmean(row):.1f} %"
        later = tasks[task.index + 1 :]
        rest = f"; about {duration(self.seconds_left(task))} left" if later else ""
        logger.info(
            "task %d of %d: %s %s%s %s%s%s",
            *(task.index + 1, len(tasks), "class" if len(names) == 1 else "classes"),
            *(", ".join(names[:_MOST_NAMES]), more, how, accuracy, rest),
        )

    def seconds_left(self, task: Task) -> float:
        """Estimate how long the tasks after this one will take, from what was measured so far; without the report at the end."""
        evaluator, setting = self.evaluator, self.setting
        later = setting.tasks[task.index + 1 :]
        phases = phase_seconds(self.folder)
        # Training the base may be a different kind of work: it counts only while there is nothing else.
        alike = [record for name, record in phases.items() if name != BASE_PHASE] or list(phases.values())
        seconds_per_image = _ratio([record["seconds"] for record in alike], [record["images"] for record in alike])
        left = 0.0
        for one in later:
            for phase in evaluator.strategy.phases(one):
                images = phase_images(phase, setting.num_images, setting.training)
                left += seconds_per_image * images / (evaluator.accelerator.num_processes if phase.independent else 1)
        prepared = [seconds for index, seconds in preparation_seconds(self.folder).items() if index > 0]
        left += len(later) * fmean(prepared or [0.0])
        done = [(one, record) for one, record in zip(setting.tasks, evaluator.records(), strict=True) if record]
        if evaluator.config.evaluation and done:
            for part, count in (("sampling", evaluator.sampled_classes), ("classifier", setting.seen)):
                seconds = [record["seconds"][part] for _, record in done]
                rate = _ratio(seconds, [len(count(one)) for one, _ in done])
                left += rate * sum(len(count(one)) for one in later)
        return left


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return sum(numerators) / max(sum(denominators), 1)
