"""DiffClass, from scratch: a LoRA for each task on a frozen base, and a classifier that is kept from telling drawn images from real.

Source: after DiffClass (Meng et al., ECCV 2024, arXiv 2403.05016), whose code and recipe are not public: a LoRA for each task, training
    on real images mixed with drawn ones, and the domain head [text, fig]; all numbers, and a base from scratch [ours].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ...adapters.class_folder import ADAPTERS_FOLDER, adapter_name, save_adapter_tensors
from ...adapters.untrusted_adapter import REMEDY
from ...data.tasks import Task
from ...sampling.pipeline import FunLoraPipeline
from ...tuner.hotswap import SAVED_PREFIX, plain_key
from ...utils.files import read_tensors
from ..base import base_shape, load_pipeline
from ..strategy import Phase, Setting, Trainable, tensor_bytes
from .lora_per_task import LoraPerTask, LoraPerTaskOptions, trains_lora
from .low_rank import LowRankOptions, NaiveLora, gaussian_lora
from .peft_methods import CLASS_EMBEDDING, VECTOR_ROW
from .sequential import CLASS_VECTORS


# The key under which PEFT saves a row of the class embedding.
_VECTOR = f"{SAVED_PREFIX}{CLASS_EMBEDDING}.token_adapter.trainable_tokens_delta"


@dataclass
class DiffClassOptions(LoraPerTaskOptions, LowRankOptions):
    """The options of the two phases, and those of `naive_lora`."""


class DiffClass(LoraPerTask, NaiveLora):
    """Trains a LoRA and class vectors for each task, which never change afterwards, then the classifier of all classes.

    Each class has an adapter of its own on disk: the LoRA of its task, and its vector.
    """

    name = "diffclass"
    options_class = DiffClassOptions

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.adapters_dir = setting.output_dir / ADAPTERS_FOLDER
        self._pipe: FunLoraPipeline | None = None

    def is_finished(self, phase: Phase) -> bool:
        return self._has_adapters(phase.class_ids) if trains_lora(phase) else super().is_finished(phase)

    def build(self, phase: Phase) -> Trainable:
        trainable = super().build(phase)
        if trains_lora(phase):
            self._keep_past_vectors(self.task_of(phase), trainable.parameters[CLASS_VECTORS])
        return trainable

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        if trains_lora(phase):
            self._save(phase, trainable)
        else:
            super().end_phase(phase, trainable)

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
