"""DiffClass, from scratch: a LoRA for each task on a frozen base, and a classifier that is kept from telling drawn images from real.

Source: after DiffClass (Meng et al., ECCV 2024, arXiv 2403.05016), whose code and recipe are not public: a LoRA for each task, training
    on real images mixed with drawn ones, and the domain head [text, fig]; all numbers, and a base from scratch [ours].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import UNet2DModel
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.nn import functional

from ...adapters.class_folder import ADAPTERS_FOLDER, adapter_name, save_adapter_tensors
from ...adapters.untrusted_adapter import REMEDY
from ...data.pixels import to_model_range
from ...data.tasks import Task
from ...sampling.pipeline import FunLoraPipeline
from ...tuner.hotswap import SAVED_PREFIX, plain_key
from ...tuner_base.wrappers import evaluation_mode
from ...utils.field_types import Range, Share, one_of
from ...utils.files import read_tensors
from ..base import BASE_PHASE, base_shape, load_pipeline
from ..devices import on_device
from ..strategy import Batch, Phase, PhaseSettings, Setting, Trainable, tensor_bytes
from ..trainer import phase_steps
from .domain_adversarial import DomainAdversarial, strength_at
from .generated_images import ReplayedClassifierOptions, mix
from .low_rank import LowRankOptions, NaiveLora, gaussian_lora
from .peft_methods import CLASS_EMBEDDING, VECTOR_ROW
from .replaying import Replaying, is_classifier
from .sequential import CLASS_VECTORS


# With selection="confidence", the likeliest of so many images is shown.
CANDIDATES = 2
# The key under which PEFT saves a row of the class embedding.
_VECTOR = f"{SAVED_PREFIX}{CLASS_EMBEDDING}.token_adapter.trainable_tokens_delta"


@dataclass
class DiffClassOptions(ReplayedClassifierOptions, LowRankOptions):
    """
    Args:
        matching_share: share of drawn images of past classes in the batches of a LoRA.
        synthetic_share: share of drawn images among those of new classes in the batches of the classifier; 0: real ones only.
        selection: which drawn image of a new class the classifier sees: of two, the one that it finds more likely to be of the
            class, "confidence", or any, "none".
        domain_weight: strength of the reversed gradient at the end of a phase; 0: no domain head.

    The other options are those of the classifier of `replay` and of `naive_lora`. All are [ours].
    """

    matching_share: Annotated[float, Range(0, 0.9, why="the rest are real images of new classes")] = 0.25
    synthetic_share: Share = 0.5
    selection: Annotated[str, one_of("confidence", "none")] = "confidence"
    domain_weight: Annotated[float, Range(0)] = 1.0


class DiffClass(Replaying, NaiveLora):
    """Trains a LoRA and class vectors for each task, which never change afterwards, then the classifier of all classes.

    Each class has an adapter of its own on disk: the LoRA of its task, and its vector.
    """

    name = "diffclass"
    options_class = DiffClassOptions
    has_frozen_base = True
    learning_changes_past_classes = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.grows_with_tasks = True
        self.adapters_dir = setting.output_dir / ADAPTERS_FOLDER
        self._pipe: FunLoraPipeline | None = None
        self._live: Any = None
        self._new: Mapping[int, Tensor] = {}

    def phase_settings(self, task: Task) -> PhaseSettings:
        """Settings in which each new class is seen as often as by funlora, beside the drawn images of past classes."""
        settings, longer = super().phase_settings(task), 1 / (1 - self.options.matching_share)
        steps, epochs = (None if n is None else round(n * longer) for n in (settings.train_steps, settings.epochs))
        return replace(settings, train_steps=steps, epochs=epochs)

    def drawn(self, task: Task) -> dict[int, int]:
        new = task.class_ids if task.index > 0 and self.options.synthetic_share else ()
        given, real = self.options.images_per_class, self.setting.num_images
        return {**super().drawn(task), **{class_id: given or real[class_id] for class_id in new}}

    def is_finished(self, phase: Phase) -> bool:
        return self._has_adapters(phase.class_ids) if _trains_lora(phase) else super().is_finished(phase)

    def build(self, phase: Phase) -> Trainable:
        trainable = super().build(phase)
        if _trains_lora(phase):
            self._keep_past_vectors(self.task_of(phase), trainable.parameters[CLASS_VECTORS])
        elif is_classifier(phase):
            self._live = trainable.module
            if self._is_adversarial(phase):
                module = DomainAdversarial(self._live).train()
                return Trainable(module, dict(module.named_parameters()), dict(module.named_buffers()))
        return trainable

    def make_batch(self, phase: Phase, real: Batch) -> Batch:
        if _trains_lora(phase):
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
        if _trains_lora(phase):
            self._save(phase, trainable)
        else:
            # Each task begins with a new domain head.
            module = self._live if is_classifier(phase) else trainable.module
            super().end_phase(phase, replace(trainable, module=module))

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self._live, self._new = None, {}

    def sampler(self, task: Task | None) -> FunLoraPipeline:
        """Return a pipeline with the base and the adapters of all finished tasks; a class is the same after every task."""
        if self._pipe is None:
            self._pipe = load_pipeline(self.setting.base_dir, self.setting)
        for class_id in (class_id for learned in self._learned() for class_id in learned.class_ids):
            if class_id not in self._pipe.classes:
                name = self.setting.class_names[class_id]
                self._pipe.load_adapter(self._file(class_id).parent, class_label=class_id, class_name=name)
        return self._pipe

    def memory_report(self) -> dict[str, int]:
        report = super().memory_report()
        for first, *others in (task.class_ids for task in self._learned()):
            vector = self._vector(first).nbytes
            # The adapters of a task have the same LoRA.
            report["persistent"] += tensor_bytes(self._file(first)) + len(others) * vector
            report["per_class"] += vector + len(others) * vector
        return report

    def _file(self, class_id: int) -> Path:
        return self.adapters_dir / adapter_name(class_id) / SAFETENSORS_WEIGHTS_NAME

    def _has_adapters(self, class_ids: Sequence[int]) -> bool:
        return all(self._file(class_id).is_file() for class_id in class_ids)

    def _learned(self) -> list[Task]:
        """Return the tasks after the first whose adapters are all on disk."""
        return [task for task in self.setting.tasks[1:] if self._has_adapters(task.class_ids)]

    def _vector(self, class_id: int) -> Tensor:
        """Return the vector of a class in its adapter, `(1, dim)`."""
        return read_tensors(self._file(class_id), remedy=REMEDY, keys=[_VECTOR])[_VECTOR]

    def _keep_past_vectors(self, task: Task, vectors: nn.Parameter) -> None:
        """Give past classes the vectors that they have learned, and train those of the task's classes only."""
        seen = self.setting.seen(task)
        with torch.no_grad():
            for class_id in (class_id for past in self.setting.tasks[1 : task.index] for class_id in past.class_ids):
                vectors[seen.index(class_id)] = self._vector(class_id)[0]
        is_new = torch.tensor([class_id in task.class_ids for class_id in seen], device=vectors.device)[:, None]
        vectors.register_hook(lambda gradient: gradient * is_new)

    def _save(self, phase: Phase, trainable: Trainable) -> None:
        """Write the adapter of each class of a task."""
        setting, vectors = self.setting, trainable.parameters[CLASS_VECTORS].detach()
        lora = get_peft_model_state_dict(trainable.module, save_embedding_layers=False)
        tensors = {f"{SAVED_PREFIX}{plain_key(key)}": tensor for key, tensor in lora.items()}
        layers = self.target_modules(base_shape(setting))
        config = gaussian_lora(self.rank, layers)
        # PEFT makes a set of them, whose order differs between processes.
        config.target_modules, config.inference_mode = layers, True
        config.trainable_token_indices = {CLASS_EMBEDDING: [VECTOR_ROW]}
        config.base_model_name_or_path, config.revision = setting.base_source, setting.model.base_model_revision
        config.auto_mapping = {"base_model_class": UNet2DModel.__name__, "parent_library": UNet2DModel.__module__}
        for class_id in phase.class_ids:
            row = setting.seen(self.task_of(phase)).index(class_id)
            contents = {**tensors, _VECTOR: vectors[row : row + 1].clone()}
            folder, name = self.adapters_dir / adapter_name(class_id), setting.class_names[class_id]
            save_adapter_tensors(config, {key: one.cpu() for key, one in contents.items()}, folder, class_name=name)

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
    """Return the place of the image in each group of `candidates` that the classifier finds likeliest to be of its class.

    Args:
        classifier: from images to logits `(batch, classes)`; it runs in evaluation mode.
        images: `(n * candidates, channels, height, width)` in [-1, 1], group after group.
        rows: row of the logits for each image, `(n * candidates,)`, int64.
        candidates: size of a group.

    Returns:
        `(n,)`, int64.
    """
    with evaluation_mode(classifier):
        found = classifier(images).log_softmax(dim=1).gather(1, rows[:, None]).view(-1, candidates)
    return found.argmax(dim=1) + candidates * torch.arange(len(found), device=found.device)


def _drawn(batch: Batch) -> Tensor:
    """Return which samples of a batch are drawn, `(batch,)`, bool, on the CPU."""
    return torch.zeros(len(batch.class_ids), dtype=torch.bool) if batch.drawn is None else batch.drawn


def _trains_lora(phase: Phase) -> bool:
    return phase.name != BASE_PHASE and not is_classifier(phase)
