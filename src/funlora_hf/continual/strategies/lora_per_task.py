"""A LoRA for each task on a frozen generator, and a classifier that is kept from telling drawn images from real.

Source: after DiffClass, see `diffclass`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...data.pixels import to_model_range
from ...data.tasks import Task
from ...tuner_base.wrappers import evaluation_mode
from ...utils.field_types import Range, Share, one_of
from ..base import BASE_PHASE
from ..devices import on_device
from ..strategy import Batch, Phase, PhaseSettings, Setting, Trainable
from ..trainer import phase_steps
from .domain_adversarial import DomainAdversarial, strength_at
from .generated_images import ReplayedClassifierOptions, mix
from .replaying import Replaying, is_classifier


# With selection="confidence", the likeliest of so many images is shown.
CANDIDATES = 2


@dataclass
class LoraPerTaskOptions(ReplayedClassifierOptions):
    """
    Args:
        matching_share: share of drawn images of past classes in the batches of a LoRA.
        synthetic_share: share of drawn images among those of new classes in the batches of the classifier; 0: real ones only.
        selection: which drawn image of a new class the classifier sees: of two, the one that it finds more likely to be of the
            class, "confidence", or any, "none".
        domain_weight: strength of the reversed gradient at the end of a phase; 0: no domain head.

    The other options are those of the classifier of `replay`. All are [ours].
    """

    matching_share: Annotated[float, Range(0, 0.9, why="the rest are real images of new classes")] = 0.25
    synthetic_share: Share = 0.5
    selection: Annotated[str, one_of("confidence", "none")] = "confidence"
    domain_weight: Annotated[float, Range(0)] = 1.0


class LoraPerTask(Replaying):
    """Draws past classes, each with the LoRA of its task, for the LoRA of a new task, then for the classifier of all classes.

    A subclass trains the LoRA, and says how it is kept.
    """

    has_frozen_base = True
    learning_changes_past_classes = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.grows_with_tasks = True
        self._live: Any = None
        self._new: Mapping[int, Tensor] = {}

    def phase_settings(self, task: Task) -> PhaseSettings:
        """Settings in which each new class is seen as often as by funlora, beside the drawn images of past classes."""
        settings, share = super().phase_settings(task), self.options.matching_share if task.index > 0 else 0.0
        longer = 1 / (1 - share)
        steps, epochs = (None if n is None else round(n * longer) for n in (settings.train_steps, settings.epochs))
        return replace(settings, train_steps=steps, epochs=epochs)

    def drawn(self, task: Task) -> dict[int, int]:
        new = task.class_ids if task.index > 0 and self.options.synthetic_share else ()
        given, real = self.options.images_per_class, self.setting.num_images
        return {**super().drawn(task), **{class_id: given or real[class_id] for class_id in new}}

    def build(self, phase: Phase) -> Trainable:
        trainable = super().build(phase)
        if is_classifier(phase):
            self._live = trainable.module
            if self._is_adversarial(phase):
                module = DomainAdversarial(self._live).train()
                return Trainable(module, dict(module.named_parameters()), dict(module.named_buffers()))
        return trainable

    def make_batch(self, phase: Phase, real: Batch) -> Batch:
        if trains_lora(phase):
            share = self.options.matching_share
            return mix(real, self._generated, share=share) if share else real
        mixed = super().make_batch(phase, real)
        return self._with_new(phase, mixed) if is_classifier(phase) else mixed

    def training_step(self, phase: Phase, batch: Batch, module: nn.Module) -> Tensor:
        if not self._is_adversarial(phase):
            return super().training_step(phase, batch, module)
        training = self.setting.training
        batches = phase_steps(phase.settings, 0, training) * training.gradient_accumulation_steps
        logits, domains = module(batch.sample, strength_at(batch.number / batches, self.options.domain_weight))
        classification = functional.cross_entropy(logits, self.rows(phase, batch), reduction="none")
        drawn = on_device(_drawn(batch).long(), batch.sample.device)
        return classification + functional.cross_entropy(domains, drawn, reduction="none")

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        # Each task begins with a new domain head.
        module = self._live if is_classifier(phase) else trainable.module
        super().end_phase(phase, replace(trainable, module=module))

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self._live, self._new = None, {}

    def _is_adversarial(self, phase: Phase) -> bool:
        return is_classifier(phase) and self.task_of(phase).index > 0 and self.options.domain_weight > 0

    def _with_new(self, phase: Phase, batch: Batch) -> Batch:
        """Return a batch in which drawn images replace a share of the real ones, each one of its own class."""
        task, options = self.task_of(phase), self.options
        counts = {class_id: count for class_id, count in self.drawn(task).items() if class_id in task.class_ids}
        if not counts:
            return batch
        if not self._new:
            self._new = self.images.draw(self.sampler(task), counts, f"new_{task.index + 1}")
        drawn, candidates = _drawn(batch), CANDIDATES if options.selection == "confidence" else 1
        replaced = ~drawn & (torch.rand(len(drawn)) < options.synthetic_share)
        positions = torch.rand(len(drawn), candidates)[replaced].tolist()
        if not positions:
            return batch
        pools = [self._new[class_id] for class_id in batch.class_ids[replaced].tolist()]
        images = torch.stack(
            [pool[int(at * len(pool))] for pool, ats in zip(pools, positions, strict=True) for at in ats]
        )
        images = to_model_range(on_device(images, batch.sample.device))
        places = on_device(replaced.nonzero().flatten(), batch.sample.device)
        if candidates > 1:
            rows = self.rows(phase, batch)[places].repeat_interleave(candidates)
            images = images[likeliest_of(self._live, images, rows, candidates)]
        return replace(batch, sample=batch.sample.index_copy(0, places, images), drawn=drawn | replaced)


@torch.no_grad()
def likeliest_of(classifier: nn.Module, images: Tensor, rows: Tensor, candidates: int) -> Tensor:
    """Return the place of the image in each group that the classifier finds likeliest to be of its class, `(n,)`, int64.

    Args:
        classifier: from images to logits `(batch, classes)`; it runs in evaluation mode.
        images: `(n * candidates, channels, height, width)` in [-1, 1], group after group.
        rows: row of the logits for each image, `(n * candidates,)`, int64.
        candidates: size of a group.
    """
    with evaluation_mode(classifier):
        found = classifier(images).log_softmax(dim=1).gather(1, rows[:, None]).view(-1, candidates)
    return found.argmax(dim=1) + candidates * torch.arange(len(found), device=found.device)


def _drawn(batch: Batch) -> Tensor:
    """Return which samples of a batch are drawn, `(batch,)`, bool, on the CPU."""
    return torch.zeros(len(batch.class_ids), dtype=torch.bool) if batch.drawn is None else batch.drawn


def trains_lora(phase: Phase) -> bool:
    """Return whether a phase trains the LoRA of its task."""
    return phase.name != BASE_PHASE and not is_classifier(phase)
