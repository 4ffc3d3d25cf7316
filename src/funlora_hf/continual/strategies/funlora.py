"""FunLoRA and its baseline "class vector only": a frozen base, one adapter for every later class.

Source: arXiv 2510.02631, class-incremental generation [text].
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import UNet2DModel
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ...adapters.base_fingerprint import FingerprintCheck, base_fingerprints
from ...adapters.class_folder import ADAPTERS_FOLDER, adapter_folders, adapter_name, class_in_name, save_adapter
from ...adapters.mean_start import misfits, set_to_mean, start_from
from ...adapters.untrusted_adapter import read_adapter
from ...data.tasks import Task
from ...layer_selection import ParametersPerClass, parameters_per_class
from ...sampling.pipeline import FunLoraPipeline
from ...tuner import FunLoraConfig, mixed_batch
from ...tuner.learning_rates import ALPHA_RATE, kind_of
from ...tuner_base.meta_shapes import adapted_shape
from ...utils.files import file_sha256
from ..base import BASE_PHASE, arrange, base_shape, label_rows, load_pipeline, save_base, trainable_unet
from ..config import MEAN
from ..strategy import (
    Batch,
    Phase,
    PhaseSettings,
    Setting,
    Strategy,
    Trainable,
    folder_bytes,
    velocity_losses,
)
from .peft_methods import RATES, VECTOR_ROW, peft_method


logger = logging.getLogger(__name__)

# In a phase of one class, the adapter has this name in the model; on disk it has the name of its class. So the guards of
# torch.compile stay the same, and the next class runs the same code.
LIVE = "live"

# Beyond these values float32 loses digits: the rounded argument of the cosine causes an error of about 1e-4; 10 to the power 32
# still has a gradient, and below -4 the slope of a power overflows at zero.
_LARGEST_OMEGA = {"cosine": 1000.0, "power": 32.0}
_SMALLEST_EXPONENT = -4.0


class FunLora(Strategy):
    """Task 1 trains the base; then every class trains its own adapter, and nothing else ever changes."""

    name = "funlora"
    grows_with_tasks = True
    learning_changes_past_classes = False
    has_frozen_base = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.adapters_dir = setting.output_dir / ADAPTERS_FOLDER
        self._unet: UNet2DModel | None = None
        self._base_fingerprint: dict[str, str] | None = None
        self._pipe: FunLoraPipeline | None = None

    @property
    def method_name(self) -> str:
        """The method of a class's adapter, a key of `PEFT_METHODS`."""
        return self.setting.model.peft_method

    def check(self) -> None:
        config = self.adapter_config(next(iter(self.setting.class_names)))
        if self.setting.training.class_batches == "mixed":
            if not isinstance(config, FunLoraConfig):
                raise ValueError(
                    f"`class_batches` is 'mixed', which `peft_method` {self.method_name!r} cannot train: take 'homogeneous'."
                )
            if self.setting.training.torch_compile:
                raise ValueError(
                    "`torch_compile` is set, but `class_batches` is 'mixed', for which every batch would be compiled again: leave "
                    "one of the two out."
                )
        if self.setting.training.adapter_start == MEAN and not isinstance(config, FunLoraConfig):
            raise ValueError(
                f"`adapter_start` is {MEAN!r}, for which `peft_method` {self.method_name!r} has no mean: take 'cold'."
            )
        self._check_rates(config)

    def phases(self, task: Task) -> list[Phase]:
        """Return the base's phase, or one phase for each new class ("mixed": one for all of them)."""
        training = self.setting.training
        if task.index == 0:
            if self.setting.has_base:
                return []
            return [Phase(BASE_PHASE, task.class_ids, PhaseSettings.of(training, "base"), independent=False)]
        settings = PhaseSettings.of(training, "adapter")
        if training.class_batches == "mixed":
            return [Phase(f"task_{task.index + 1}", task.class_ids, settings, independent=True)]
        return [Phase(adapter_name(c), (c,), settings, independent=True) for c in task.class_ids]

    def is_finished(self, phase: Phase) -> bool:
        if phase.name == BASE_PHASE:
            return self.setting.base_dir.is_dir()
        return all((self.adapters_dir / adapter_name(class_id)).is_dir() for class_id in phase.class_ids)

    def build(self, phase: Phase) -> Trainable:
        if phase.name == BASE_PHASE:
            return trainable_unet(self.setting, len(phase.class_ids))
        names = live_names(phase)
        first, *others = names
        unet = self._frozen_unet()
        model = get_peft_model(unet, self.adapter_config(names[first]), adapter_name=first)
        start_class_vectors(model)
        for name in others:
            model.add_adapter(name, self.adapter_config(names[name]))
        if others:
            model.set_requires_grad(others)
        if self.setting.training.adapter_start == MEAN:
            self._start_at_mean(model, phase)
        return self._trainable(model)

    def build_update(self, class_id: int) -> Trainable:
        """Build what `--update_class` trains: the class's adapter from disk, or a new one with its config.

        Raises:
            BaseMismatchError: it was trained for another base.
            ValueError: the adapters that a new one has to start from are gone, or have changed.
        """
        folder = os.fspath(self.adapters_dir / adapter_name(class_id))
        config = PeftConfig.from_pretrained(folder)
        FingerprintCheck(self._frozen_unet()).check(config, folder)
        mode = self.setting.training.update_mode
        if mode == "continue":
            model = PeftModel.from_pretrained(self._frozen_unet(), folder, adapter_name=LIVE, is_trainable=True)
        else:
            config.inference_mode = False
            started_from = self._started_from(config, class_id) if mode == "retrain" else []
            if isinstance(config, FunLoraConfig):
                config.started_from = None
            model = get_peft_model(self._frozen_unet(), config, adapter_name=LIVE)
            start_class_vectors(model)
            if started_from:
                start_from(model, started_from, LIVE)
        return self._trainable(model)

    def adapter_config(self, class_id: int) -> PeftConfig:
        """Return the configuration of a class's adapter, with the fingerprint of the base if that is loaded."""
        config = peft_method(self.method_name).config(self._unet_shape(), self.setting.model)
        config.revision = self.setting.model.base_model_revision
        if isinstance(config, FunLoraConfig):
            config.class_label = class_id
            config.class_name = self.setting.class_names[class_id]
            config.base_fingerprint = self._base_fingerprint
        return config

    def make_batch(self, phase: Phase, real: Batch) -> Batch:
        # Adapted layers need not sort a batch that is sorted by class.
        is_mixed = phase.name != BASE_PHASE and len(phase.class_ids) > 1
        return real.reordered(real.class_ids.argsort(stable=True)) if is_mixed else real

    def training_step(self, phase: Phase, batch: Batch, module: nn.Module) -> torch.Tensor:
        if phase.name == BASE_PHASE:
            return velocity_losses(module, batch, label_rows(phase.class_ids, batch.class_ids))
        # The adapter's own vector replaces the embedding, or this row of it.
        labels = torch.full((len(batch.class_ids),), VECTOR_ROW, device=batch.sample.device)
        names = [adapter_name(class_id) for class_id in batch.class_ids.tolist()]
        # In a phase of one class, its adapter is active.
        with mixed_batch(module, names) if len(phase.class_ids) > 1 else nullcontext():
            return velocity_losses(module, batch, labels)

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        if phase.name == BASE_PHASE:
            setting = self.setting
            save_base(trainable.module.eval(), setting.base_dir, phase.class_ids, setting.class_names)
            return
        for name, class_id in live_names(phase).items():
            self._report_omega(trainable, name, class_id)
            save_adapter(
                trainable.module,
                self.adapters_dir / adapter_name(class_id),
                name,
                class_label=class_id,
                class_name=self.setting.class_names[class_id],
            )

    def _report_omega(self, trainable: Trainable, name: str, class_id: int) -> None:
        """Warn about layers whose omega has grown beyond the precision of float32. The values are not changed."""
        # The adapter's config, not the arguments: an update continues with the adapter on disk.
        config = trainable.module.peft_config[name]
        for parameter, value in trainable.parameters.items():
            # <layer>.funlora_omega.<adapter>
            layer, _, end = parameter.rpartition(".funlora_")
            if end not in (f"omega.{name}", f"add_omega.{name}"):
                continue
            low, high = omega_range(config.function, config.num_functions)
            least, most = value.detach().min().item(), value.detach().max().item()
            if not low <= least <= most <= high:
                logger.warning(
                    "Class %d (%s): omega of layer %s has grown to between %.4g and %.4g, and float32 computes %r well from %g "
                    "to %g. Lower `adapter_learning_rate`, or leave out `train_omega`.",
                    class_id,
                    self.setting.class_names[class_id],
                    layer.removeprefix("base_model.model."),
                    least,
                    most,
                    config.function,
                    low,
                    high,
                )

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        if phase.name != BASE_PHASE:
            trainable.module.unload()

    @contextmanager
    def inference(self, class_ids: Sequence[int]) -> Iterator[FunLoraPipeline]:
        if self._pipe is None:
            self._pipe = load_pipeline(self.setting.base_dir, self.setting)
            peft_method(self.method_name).prepare(self._pipe.unet)
        for class_id in class_ids:
            if class_id not in self._pipe.classes:
                folder = self.adapters_dir / adapter_name(class_id)
                names = self.setting.class_names
                self._pipe.load_adapter(folder, class_label=class_id, class_name=names[class_id])
        yield self._pipe

    def parameters_per_class(self) -> dict[str, int | None]:
        numbers = self._count()
        return {
            "parameters_per_class": numbers.without_vector,
            "parameters_per_class_with_vector": numbers.with_vector,
        }

    def memory_report(self) -> dict[str, int]:
        # Without adapters that were added to the run.
        own = [
            path for path in adapter_folders(self.adapters_dir) if class_in_name(path.name) in self.setting.class_names
        ]
        base, adapters = folder_bytes([self.setting.base_dir]), folder_bytes(own)
        # Adam's two moments, the moving average and the gradient of one adapter, in float32.
        return {"persistent": base + adapters, "per_class": adapters, "transient": 4 * 4 * self._count().with_vector}

    def _count(self) -> ParametersPerClass:
        config = self.adapter_config(next(iter(self.setting.class_names)))
        return parameters_per_class(self._unet_shape(), config)

    def _unet_shape(self) -> UNet2DModel:
        unet = base_shape(self.setting)
        peft_method(self.method_name).prepare(unet)
        return unet

    def _frozen_unet(self) -> UNet2DModel:
        if self._unet is None:
            unet = UNet2DModel.from_pretrained(self.setting.base_dir, subfolder="unet", use_safetensors=True)
            self._base_fingerprint = base_fingerprints(unet)
            self._unet = unet.to(self.setting.device).requires_grad_(False)
            peft_method(self.method_name).prepare(self._unet)
            arrange(self._unet, self.setting.training, compiled=self.setting.training.torch_compile)
            # PEFT writes this name of the base into the adapter's config.
            self._unet.name_or_path = self.setting.base_source
        return self._unet

    def _trainable(self, model: PeftModel) -> Trainable:
        # The base's dropout is on, as when the base was trained.
        model.train()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        factors = {name: self._rate(kind) for name in parameters if (kind := kind_of(name))}
        # All adapters of a phase start alike.
        config = next(iter(model.peft_config.values()))
        started_from = getattr(config, "started_from", None) or {}
        return Trainable(model, parameters, factors=factors, started_from=started_from)

    def _start_at_mean(self, model: PeftModel, phase: Phase) -> None:
        """Set the adapters of a phase to the mean of those of earlier tasks, as far as these have the same configuration."""
        names = live_names(phase)
        earlier = [self.adapters_dir / adapter_name(c) for c in self.setting.past(self.task_of(phase))]
        found = [read_adapter(folder) for folder in earlier if folder.is_dir()]
        alike = [one for one in found if not misfits(model, one, next(iter(names)))]
        start = (
            f"the mean of {len(alike)} adapters" if alike else "the base, since no earlier task has adapters like it"
        )
        logger.info("phase %s: starts at %s", phase.name, start)
        for name in names if alike else ():
            set_to_mean(model, alike, name)

    def _started_from(self, config: PeftConfig, class_id: int) -> list[Path]:
        """Return the folders of the adapters that a class started from; a ValueError if they are not what they were."""
        starts = getattr(config, "started_from", None) or {}
        folders = {name: self.adapters_dir / name for name in starts if class_in_name(name) is not None}
        files = {name: folder / SAFETENSORS_WEIGHTS_NAME for name, folder in folders.items()}
        gone = [n for n in starts if n not in files or not files[n].is_file() or file_sha256(files[n]) != starts[n]]
        if gone:
            raise ValueError(
                f"`update_mode` is 'retrain', but class {class_id} started from {', '.join(gone)}, which are gone or have been trained "
                "again since: pull them, or pass --update_mode cold."
            )
        return list(folders.values())

    def _rate(self, kind: str) -> float:
        """Return the multiple of the learning rate for parameters of a kind."""
        rate = getattr(self.setting.training, RATES[kind])
        return ALPHA_RATE if rate is None else rate

    def _check_rates(self, config: PeftConfig) -> None:
        """Raise a ValueError for a rate of parameters that the adapters do not have."""
        kinds = {kind_of(name) for name, _ in adapted_shape(self._unet_shape(), config).named_parameters()}
        for kind, name in RATES.items():
            if kind not in kinds and (rate := getattr(self.setting.training, name)) not in (1, None):
                raise ValueError(
                    f"`{name}` is {rate:g}, but the adapters have no {kind.replace('_', ' ')}: leave it out."
                )


class Frozen(FunLora):
    """Trains only the class vector: "vanilla conditioning" in the paper. Source: Table V [text]."""

    name = "frozen"

    @property
    def method_name(self) -> str:
        return "class_vector"


def live_names(phase: Phase) -> dict[str, int]:
    """Return the names of the adapters in the model -> their classes, for an adapter phase."""
    if len(phase.class_ids) == 1:
        return {LIVE: phase.class_ids[0]}
    return {adapter_name(class_id): class_id for class_id in phase.class_ids}


def start_class_vectors(model: PeftModel) -> None:
    """Set vectors that PEFT trains as a row of the class embedding to the mean of the rows, where FunLoRA's vector starts."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            rows = module.get_base_layer().get_parameter("weight").detach()
            for vector in module.trainable_tokens_delta.values():
                vector.data.copy_(rows.mean(dim=0).expand_as(vector))


def omega_range(function: str, num_functions: int) -> tuple[float, float]:
    """Return the range of omega in which float32 computes "cosine" or "power" of p functions accurately. Source: [ours]."""
    # The exponents start at 1..p.
    largest = max(_LARGEST_OMEGA[function], 2.0 * num_functions)
    return (-largest if function == "cosine" else _SMALLEST_EXPONENT), largest
