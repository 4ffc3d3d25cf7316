"""What strategies that replay share: images of past classes, drawn before a task, and a classifier that learns from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from ...classifier import build_classifier
from ...data.tasks import Task
from ...sampling.pipeline import FunLoraPipeline
from ..base import BASE_PHASE, label_rows
from ..devices import on_device
from ..strategy import Batch, Phase, PhaseSettings, Setting, Trainable, tensor_bytes
from .generated_images import GeneratedImages, mix
from .sequential import KeptFile, Sequential


_CLASSIFIER = "classifier_task_"


class Replaying(Sequential):
    """After a task's generator, trains a classifier on real images of new classes mixed with generated images of past classes.

    The classifier starts from its weights after the previous task. Real images of past tasks are never read.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.classifiers = KeptFile(setting.output_dir / "checkpoints" / "classifier")
        self.images = GeneratedImages(
            setting.output_dir / "checkpoints" / "replay", self.options, setting.training.seed
        )
        self._generated: dict[int, torch.Tensor] = {}

    def begin_task(self, task: Task) -> None:
        if task.index > 0 and not all(self.is_finished(phase) for phase in self.phases(task)):
            self._generated = self.draw_past(self.sampler(self.before(task)), task)

    def draw_past(self, pipe: FunLoraPipeline, task: Task) -> dict[int, torch.Tensor]:
        """Return images of each past class, uint8, drawn by the generator of the previous task."""
        return self.images.draw(pipe, self.past(task), f"replay_{task.index + 1}")

    def past(self, task: Task) -> dict[int, int]:
        """Return the number of images to generate of each class of earlier tasks."""
        real = self.setting.num_images
        # Classes of a given base may have no images: then as many as the largest of the task's own classes.
        fallback = max(real.get(class_id, 1) for class_id in task.class_ids)
        given = self.options.images_per_class
        return {class_id: given or real.get(class_id) or fallback for class_id in self.setting.past(task)}

    def drawn(self, task: Task) -> dict[int, int]:
        """Return the number of all images to generate for a task, by class."""
        return self.past(task)

    def replay_evaluations(self, task: Task) -> int:
        per_image = self.evaluations_per_image(self.options.solver, self.options.num_inference_steps)
        return sum(self.drawn(task).values()) * per_image

    def phases(self, task: Task) -> list[Phase]:
        generator = super().phases(task)
        if task.index == 0 and not all(self.setting.num_images.get(class_id) for class_id in task.class_ids):
            return generator  # a given base without its images
        options, seen = self.options, len(self.setting.seen(task))
        settings = PhaseSettings(
            train_steps=options.classifier_train_steps * seen,
            epochs=None,
            batch_size=options.classifier_batch_size,
            learning_rate=options.classifier_learning_rate,
            warmup_steps=0,
            # No moving average, since the running means of batch normalization belong to the weights as trained.
            ema_decay=0.0,
            ema_start=0.0,
        )
        return [*generator, Phase(f"{_CLASSIFIER}{task.index + 1}", task.class_ids, settings, independent=False)]

    def is_finished(self, phase: Phase) -> bool:
        if not is_classifier(phase):
            return super().is_finished(phase)
        return self.classifiers.newest(self.setting.tasks[self.task_of(phase).index :]) is not None

    def build(self, phase: Phase) -> Trainable:
        if not is_classifier(phase):
            return super().build(phase)
        task = self.task_of(phase)
        module = self._classifier(task, self.classifiers.newest(self.setting.tasks[: task.index])).train()
        return Trainable(module, dict(module.named_parameters()), dict(module.named_buffers()))

    def make_batch(self, phase: Phase, real: Batch) -> Batch:
        if phase.name == BASE_PHASE:
            return real
        return mix(real, self.generated(phase, real), len(phase.class_ids))

    def generated(self, phase: Phase, real: Batch) -> Mapping[int, torch.Tensor]:
        """Return images of past classes, uint8, for a batch of a phase."""
        return self._generated

    def training_step(self, phase: Phase, batch: Batch, module: nn.Module) -> torch.Tensor:
        if not is_classifier(phase):
            return super().training_step(phase, batch, module)
        return functional.cross_entropy(module(batch.sample), self.rows(phase, batch), reduction="none")

    def rows(self, phase: Phase, batch: Batch) -> torch.Tensor:
        """Return the rows of a batch's classes among those seen, `(batch,)`, int64, on the batch's device."""
        return on_device(label_rows(self.setting.seen(self.task_of(phase)), batch.class_ids), batch.sample.device)

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        if is_classifier(phase):
            self.classifiers.save(self.task_of(phase), trainable.module.state_dict())
        else:
            super().end_phase(phase, trainable)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.classifiers.drop_before(task, self.setting.tasks)
        self._generated = {}
        self.images.delete()

    def own_classifier(self) -> nn.Module | None:
        newest = self.classifiers.newest(self.setting.tasks)
        return None if newest is None else self._classifier(newest, newest).eval()

    def memory_report(self) -> dict[str, int]:
        report = super().memory_report()
        if (newest := self.classifiers.newest(self.setting.tasks)) is not None:
            report["persistent"] += tensor_bytes(self.classifiers.path(newest))
            report["per_class"] += self._head_bytes(newest)
        report["transient"] += self._replay_bytes()
        return report

    def _classifier(self, task: Task, kept: Task | None) -> nn.Module:
        """Return a classifier of the classes seen up to a task; it takes all weights that the one of an earlier task has."""
        classifier = self._untrained(len(self.setting.seen(task)))
        state = classifier.state_dict()
        for name, tensor in self.classifiers.load(kept).items():
            if tensor.dim():
                state[name][: len(tensor)] = tensor  # the head's rows for new classes stay as they are
            else:
                state[name].copy_(tensor)
        return classifier.to(self.setting.device)

    def _untrained(self, num_classes: int) -> nn.Module:
        channels, size = self.setting.image_shape
        architecture = self.options.classifier_architecture
        return build_classifier(num_classes, channels=channels, image_size=size, architecture=architecture)

    def _head_bytes(self, task: Task) -> int:
        """Return the bytes of the classifier's last layer, which has a row for each class."""
        with torch.device("meta"):
            *_, weight, bias = self._untrained(len(self.setting.seen(task))).parameters()
        return weight.nbytes + bias.nbytes

    def _replay_bytes(self) -> int:
        """Return the bytes of the images generated for the last task, which has the most."""
        channels, size = self.setting.image_shape
        return sum(self.drawn(self.setting.tasks[-1]).values()) * channels * size**2


def is_classifier(phase: Phase) -> bool:
    """Return whether a phase trains the classifier."""
    return phase.name.startswith(_CLASSIFIER)
