"""DiffClass on a pretrained text-to-image pipeline: a LoRA in diffusers' format for each task, from task 1 on.

Source: after DiffClass (Meng et al., ECCV 2024, arXiv 2403.05016), whose generator is one, too [text: summaries]; prompt, rank, layers and
    sampling are usual values [ours].
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from ...adapters.class_folder import LORAS_FOLDER
from ...adapters.untrusted_base import MOST_CONFIG, PIPELINE
from ...data.tasks import Task
from ...sampling.drawing import to_uint8
from ...sampling.pipeline import FunLoraPipelineOutput
from ...text_to_image.model import TextToImageModel
from ...text_to_image.objective import Objective
from ...text_to_image.token_rows import prompt_arguments
from ...utils.checks import check_choice, expanded
from ...utils.field_types import Count, Range, one_of
from ...utils.files import read_mapping, read_tensors, write_tensors
from ..config import ModelArguments
from ..strategy import Batch, Phase, Setting, Trainable, tensor_bytes
from .lora_per_task import LoraPerTask, LoraPerTaskOptions, trains_lora
from .low_rank import DEFAULT_RANK, gaussian_lora
from .sequential import check_one_generator


_ADAPTER = "default"
# They act on a U-Net from scratch, or push a run's own base.
_UNUSED = ("channels_last", "torch_compile", "push_to_hub")


def _check_prompt(name: str, value: str) -> None:
    if "{}" not in value:
        raise ValueError(f"`{name}` is {value!r}, expected text with {{}}, where the name of a class is put in.")


@dataclass
class DiffClassPretrainedOptions(LoraPerTaskOptions):
    """
    Args:
        pretrained: folder of a Stable Diffusion, SDXL, SD3 or Flux pipeline, which is read only.
        image_size: height and width of the images that classifiers see and the run keeps, such as those of the data set.
        channels: of these images: 3, or 1 for grey, which are repeated for the pipeline; what it draws is averaged over its channels.
        prompt: text with {}, for which the name of a class is put in.
        guidance_scale: of classifier-free guidance; 1: none.
        targets: the layers with a LoRA: "attention", all projections of self- and cross-attention.
        solver: "scheduler", that of the pipeline.

    The other options are those of the two phases. All are [ours].
    """

    pretrained: str = field(kw_only=True)
    image_size: Count = 32
    channels: Annotated[int, partial(check_choice, choices=(1, 3))] = 3
    prompt: Annotated[str, _check_prompt] = "a photo of a {}"
    guidance_scale: Annotated[float, Range(1, why="1 is none")] = 2.5
    targets: Annotated[str, one_of("attention")] = "attention"
    solver: Annotated[str, one_of("scheduler")] = "scheduler"
    num_inference_steps: Count = 50
    sampling_batch_size: Count = 8


class DiffClassPretrained(LoraPerTask):
    """Trains a LoRA of a frozen text-to-image pipeline for each task, then the classifier of all classes.

    Classes are drawn by prompts with their names, each with the LoRA of its task.
    """

    name = "diffclass"
    options_class = DiffClassPretrainedOptions
    outside_data = True
    has_held_out_loss = False
    trains_own_base = True
    trains_base = False
    takes = ("rank",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.setting = replace(setting, base_dir=Path(expanded("pretrained", self.options.pretrained)))
        self.rank = DEFAULT_RANK if setting.model.rank is None else setting.model.rank
        self._task: Task | None = None  # whose LoRA is in the model

    @classmethod
    def image_shape(cls, model: ModelArguments, options: DiffClassPretrainedOptions) -> tuple[int, int]:
        return options.channels, options.image_size

    def check(self) -> None:
        check_one_generator(self, self.takes)
        training, folder = self.setting.training, self.setting.base_dir
        for name in _UNUSED:
            if getattr(training, name):
                raise ValueError(f"`{name}` is True, which diffclass does not use with `pretrained`: leave it out.")
        if not (folder / PIPELINE).is_file():
            raise FileNotFoundError(
                f"`pretrained` is {os.fspath(folder)!r}, expected a folder with a {PIPELINE}: download a pipeline into one, or save it there."
            )
        index = read_mapping(folder / PIPELINE, most_bytes=MOST_CONFIG)
        if index.get("unet") == ["diffusers", "UNet2DModel"]:
            raise ValueError(
                f"`pretrained` is {os.fspath(folder)!r}, a generator of classes, expected a text-to-image pipeline: name it by --base_model, "
                "and leave `pretrained` out."
            )
        _ = self.objective  # reads the pipeline, and refuses a scheduler that does not fit

    @cached_property
    def model(self) -> TextToImageModel:
        """The pipeline, with one LoRA in it, whose values change."""
        # Loading must not change what a phase draws afterwards.
        with torch.random.fork_rng(devices=[]):
            device = self.setting.device
            model = TextToImageModel.from_pretrained(self.setting.base_dir, device=device, field="pretrained")
            model.denoiser.add_adapter(gaussian_lora(self.rank, model.layers("attention")), adapter_name=_ADAPTER)
        return model

    @cached_property
    def objective(self) -> Objective:
        """The loss, by the pipeline's scheduler."""
        return Objective(self.model.scheduler, timestep_density=self.setting.training.timestep_density)

    def is_finished(self, phase: Phase) -> bool:
        return self.file(self.task_of(phase)).is_file() if trains_lora(phase) else super().is_finished(phase)

    def _unet(self, task: Task, kept: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        return self.model, dict(kept)

    def trainable(self, unet: Any, kept: Mapping[str, Tensor]) -> Trainable:
        self._task = None
        for layer in (layer for layer in unet.denoiser.modules() if isinstance(layer, LoraLayer)):
            layer.reset_lora_parameters(_ADAPTER, "gaussian")
        return Trainable(unet, {name: p for name, p in unet.named_parameters() if p.requires_grad})

    def learned(self, trainable: Trainable, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = trainable.module
        lora = get_peft_model_state_dict(model.denoiser, adapter_name=_ADAPTER)
        return {f"{model.denoiser_name}.{key}": tensor.detach().cpu().contiguous() for key, tensor in lora.items()}

    def load(self, unet: Any, kept: Mapping[str, Tensor]) -> None:
        lora = {key.removeprefix(f"{unet.denoiser_name}."): tensor for key, tensor in kept.items()}
        set_peft_model_state_dict(unet.denoiser, lora, adapter_name=_ADAPTER)

    def training_step(self, phase: Phase, batch: Batch, module: nn.Module) -> Tensor:
        if not trains_lora(phase):
            return super().training_step(phase, batch, module)
        # On the CPU, as for all devices; torch is seeded for the step.
        objective, device, random = self.objective, batch.sample.device, torch.default_generator
        mean, std = self.model.encode_images(self._for_pipeline(batch.sample))
        times = objective.times(len(mean), random).to(device)
        spread, noise = torch.randn(mean.shape, generator=random), objective.noise(mean.shape, random)
        latents, noise = mean + std * spread.to(device), noise.to(device)
        prompts = [self.prompt(class_id) for class_id in batch.class_ids.tolist()]
        prediction = module(objective.noisy(latents, noise, times), times, prompts)
        return objective.losses(prediction, latents, noise, times)

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        if trains_lora(phase):
            write_tensors(self.file(self.task_of(phase)), self.learned(trainable, {}))
        else:
            super().end_phase(phase, trainable)

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self.model.eval()

    def evaluations_per_image(self, solver: str, num_inference_steps: int) -> int:
        return num_inference_steps

    def sampler(self, task: Task | None) -> Any:
        """Return what draws the classes of all finished tasks, as a [`FunLoraPipeline`] does; a class is the same after every task."""
        return PromptedClasses(self)

    def use(self, class_id: int) -> None:
        """Put the LoRA of a class's task into the model."""
        task = next(task for task in self.setting.tasks if class_id in task.class_ids)
        if task != self._task:
            remedy = "the LoRA of its task is lost; start again with --overwrite_output_dir"
            self.load(self.model, read_tensors(self.file(task), remedy=remedy))
            self._task = task

    def prompt(self, class_id: int) -> str:
        """Return the prompt of a class."""
        return self.options.prompt.replace("{}", self.setting.class_names[class_id].replace("_", " "))

    def file(self, task: Task) -> Path:
        """Return the path of a task's LoRA."""
        return self.setting.output_dir / LORAS_FOLDER / f"task_{task.index + 1}" / LORA_WEIGHT_NAME_SAFE

    def memory_report(self) -> dict[str, int]:
        report = super().memory_report()
        kept = [file for task in self.setting.tasks if (file := self.file(task)).is_file()]
        return {**report, "persistent": report["persistent"] + sum(map(tensor_bytes, kept))}

    def trained_bytes(self, base: int) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)

    def _for_pipeline(self, images: Tensor) -> Tensor:
        """Return images `(batch, channels, size, size)` in [-1, 1] as uint8 `(batch, 3, resolution, resolution)`."""
        images = resized((images + 1) / 2, self.model.resolution)
        return to_uint8(images.clamp(0, 1)).expand(-1, 3, -1, -1)


class PromptedClasses:
    """Draws classes of a run by prompts with the stock pipeline and its scheduler; it is called as a [`FunLoraPipeline`].

    Args:
        strategy: has the model and the LoRA of each task.
    """

    def __init__(self, strategy: DiffClassPretrained) -> None:
        self.strategy, self.unet = strategy, strategy.model.denoiser
        self.pipe: Any = strategy.model.pipeline()

    def __call__(
        self,
        class_labels: Sequence[int],
        *,
        num_inference_steps: int,
        generator: torch.Generator | None = None,
        **of_flows: Any,
    ) -> FunLoraPipelineOutput:
        """Draw one image for each label, `(batch, channels, size, size)` in [0, 1], in batches of at most `sampling_batch_size`.

        Args:
            class_labels: all of one task.
            num_inference_steps: of the scheduler.
            generator: draws the noise.
            of_flows: what only solvers of flows and `FunLoraPipeline` itself use; guidance is that of the strategy's options.
        """
        strategy, options, (channels, size) = self.strategy, self.strategy.options, self.strategy.setting.image_shape
        strategy.use(class_labels[0])
        parts = []
        for start in range(0, len(class_labels), options.sampling_batch_size):
            some = class_labels[start : start + options.sampling_batch_size]
            images = self.pipe(
                **prompt_arguments(self.pipe, [strategy.prompt(class_id) for class_id in some]),
                height=strategy.model.resolution,
                width=strategy.model.resolution,
                num_inference_steps=num_inference_steps,
                guidance_scale=options.guidance_scale,
                generator=generator,
                output_type="pt",
            ).images
            parts.append(resized(images.float(), size).clamp(0, 1))
        drawn = torch.cat(parts)
        drawn = drawn.mean(dim=1, keepdim=True) if channels == 1 else drawn
        # With guidance, each step also sees the empty prompt.
        twice = options.guidance_scale > 1 and not strategy.model.traits.embeds_guidance
        return FunLoraPipelineOutput(drawn, len(self.pipe.scheduler.timesteps) * (1 + twice))


def resized(images: Tensor, size: int) -> Tensor:
    """Return images `(batch, channels, height, width)`, in float32, with this height and width, by bicubic interpolation."""
    if images.shape[-1] == size:
        return images
    return functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
