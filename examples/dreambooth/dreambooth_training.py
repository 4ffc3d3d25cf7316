"""What the DreamBooth scripts share: arguments, images, prompts, the loop, and what it writes.

<output_dir>/
  settings.json   the arguments and the images, which a run that goes on must match
  checkpoints/    step_<number>/, checksummed safetensors
  validation/     step_<number>_<index>.png
  adapter/        what `load_adapter` loads
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from funlora_hf import FunLoraConfig, push_adapter, save_adapter
from funlora_hf.continual.batches import EndlessOrder
from funlora_hf.continual.checkpoint import TrainingState, load_newest, save_checkpoint
from funlora_hf.continual.guarded_steps import GuardedSteps, Outcome
from funlora_hf.continual.publishing import PushError
from funlora_hf.continual.run_folder import differences, told
from funlora_hf.continual.termination import Terminated, Termination
from funlora_hf.continual.trainer import NonFiniteLossError
from funlora_hf.data import load_image_data
from funlora_hf.hub.repository import HubRepository
from funlora_hf.personalization.prior import draw_missing
from funlora_hf.run import make_accelerator
from funlora_hf.train import ERRORS, set_up_logging
from funlora_hf.utils.arguments import refuse_unknown, tidy_help, warnings_as_lines
from funlora_hf.utils.checks import check_at_least_one, check_choice, check_not_mistyped, expanded
from funlora_hf.utils.field_types import check_field_types
from funlora_hf.utils.files import read_mapping, recover_folder, whole_file, write_json
from funlora_hf.utils.locks import folder_lock
from funlora_hf.utils.progress import Progress
from funlora_hf.utils.seeds import derive_seed, generator_for


logger = logging.getLogger(__name__)

# What may differ in a run that goes on, beside what `differences` leaves out.
_FREE = {"max_train_steps", "sample_batch_size", "gradient_checkpointing"}
_FREE |= {"validation_prompt", "num_validation_images", "validation_steps"}
# What `encode_prompt` returns, by the names under which the pipeline takes it; Flux's returns the first and the third.
_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

Prompt = dict[str, torch.Tensor]
# From the model, latents scaled as it takes them, as many prompts, and a generator on the CPU: the loss of each image.
Objective = Callable[[Callable[..., Any], torch.Tensor, Prompt, torch.Generator], torch.Tensor]


def argument(default: Any, help: str) -> Any:
    """A field with the text that `HfArgumentParser` shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class DreamBoothArguments:
    """Names are those of diffusers' own DreamBooth scripts, and of `FunLoraConfig`."""

    _argument_group_name: ClassVar[str] = "DreamBooth"

    pretrained_model_name_or_path: str = field(metadata={"help": "Pipeline: folder or repository, in safetensors."})
    instance_data_dir: str = field(metadata={"help": "Folder with the images of the subject."})
    instance_prompt: str = field(metadata={"help": "Prompt of these images, as 'a photo of sks dog'."})
    revision: str | None = argument(None, "Branch, tag or commit of the pipeline.")
    variant: str | None = argument(None, "Variant of its files, as 'fp16'.")
    output_dir: str = argument("outputs/dreambooth", "Folder of the run; the adapter is in adapter/.")
    resume_from_checkpoint: str | None = argument(None, "'latest': go on where a run in output_dir stopped.")
    seed: int = argument(0, "Seed of everything.")
    resolution: int = argument(512, "Height and width to which images are scaled and cropped, around the centre.")

    target_modules: list[str] | None = argument(  # noqa: RUF009 - makes a field
        None,
        "Names of layers to adapt, or all-conv or all-linear; None: to_q, to_k, to_v and to_out.0 of each attention.",
    )
    function: str = argument("cosine", "'cosine', 'power', 'shift' or 'identity'.")
    num_functions: int = argument(10, "The number of functions summed up.")
    train_omega: bool = argument(True, "Learn the frequencies or exponents.")
    operation: str = argument("mul", "'mul', 'add' or 'mul-add'.")
    rank: int = argument(1, "Rank of A B.")
    ratio: int = argument(1, "One entry of A and B for this many neighbouring channels.")

    with_prior_preservation: bool = argument(False, "Also train on images of the class.")
    class_data_dir: str | None = argument(None, "Folder with these images; the base draws missing ones into it.")
    class_prompt: str | None = argument(None, "Their prompt, as 'a photo of a dog'.")
    num_class_images: int = argument(100, "How many of them.")
    sample_batch_size: int = argument(4, "How many to draw at once.")
    prior_loss_weight: float = argument(1.0, "Weight of their loss.")

    max_train_steps: int = argument(500, "Steps of the optimizer.")
    train_batch_size: int = argument(4, "Images of the subject, and as many of the class, in a batch of each process.")
    gradient_accumulation_steps: int = argument(1, "Batches for each step.")
    gradient_checkpointing: bool = argument(False, "Compute activations again in the backward pass, to save memory.")
    mixed_precision: str = argument("no", "'no', 'fp16' or 'bf16': of the base, too.")
    learning_rate: float = argument(1e-3, "Learning rate; the default is a guess.")
    lr_warmup_steps: int = argument(0, "Steps of linear warm-up; the rate is constant after them.")
    use_8bit_adam: bool = argument(False, "Adam of bitsandbytes.")
    max_grad_norm: float = argument(1.0, "Clip the gradient's norm to this.")
    ema_decay: float = argument(
        0.98, "Decay of the moving average, which is saved; in step s, at most (1 + s) / (10 + s). 0: the last step."
    )
    checkpointing_steps: int = argument(500, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = argument(2, "How many to keep.")
    report_to: str = argument("none", "Tracker of accelerate: 'tensorboard', 'wandb', ...")

    num_inference_steps: int | None = argument(None, "Steps of each image that is drawn; None: as the pipeline does.")
    validation_prompt: str | None = argument(None, "Draw images of this prompt at the end, into validation/.")
    num_validation_images: int = argument(4, "How many.")
    validation_steps: int | None = argument(None, "Draw them also after every so many steps.")

    push_to_hub: bool = argument(False, "Push the adapter at the end.")
    hub_model_id: str | None = argument(None, "Where to, as 'user/repo'; None: your repository named like output_dir.")

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("pretrained_model_name_or_path", "instance_data_dir", "class_data_dir", "output_dir"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, expanded(name, path))
        check_not_mistyped("pretrained_model_name_or_path", self.pretrained_model_name_or_path, revision=self.revision)
        check_choice("mixed_precision", self.mixed_precision, ("no", "fp16", "bf16"))
        if self.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(f"`resume_from_checkpoint` is {self.resume_from_checkpoint!r}, expected 'latest'.")
        for one in fields(self):
            if type(value := getattr(self, one.name)) is int and one.name not in ("seed", "lr_warmup_steps"):
                check_at_least_one(one.name, value)
        for name, most in (("seed", 2**63), ("lr_warmup_steps", 2**63), ("prior_loss_weight", 1e6), ("ema_decay", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected a number from 0 to {most}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected a number above 0.")
        if self.revision is not None and Path(self.pretrained_model_name_or_path).is_dir():
            raise ValueError(f"`revision` is {self.revision!r}, but a folder has none: leave it out.")
        prior, defaults = "with_prior_preservation", {one.name: one.default for one in fields(self)}
        for name, needed in (
            *(("class_data_dir", prior), ("class_prompt", prior), (prior, "class_data_dir"), (prior, "class_prompt")),
            *(("num_class_images", prior), ("sample_batch_size", prior), ("prior_loss_weight", prior)),
            *(("validation_steps", "validation_prompt"), ("num_validation_images", "validation_prompt")),
            ("hub_model_id", "push_to_hub"),
        ):
            if (value := getattr(self, name)) != defaults[name] and not getattr(self, needed):
                raise ValueError(f"`{name}` is {value!r} but there is no `{needed}`: pass --{needed}, too.")
        if self.class_data_dir and Path(self.class_data_dir).resolve() == Path(self.instance_data_dir).resolve():
            raise ValueError(f"`class_data_dir` is `instance_data_dir`, {self.class_data_dir!r}: pass another folder.")
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)

    def adapter_config(self) -> FunLoraConfig:
        """Of the adapter to train; raises a ValueError for arguments that it cannot have."""
        targets = self.target_modules or ["to_q", "to_k", "to_v", "to_out.0"]
        names = ("function", "num_functions", "train_omega", "operation", "ratio", "revision")
        return FunLoraConfig(
            **{name: getattr(self, name) for name in names},
            r=self.rank,
            target_modules=targets[0] if targets in (["all-conv"], ["all-linear"]) else targets,
            base_model_name_or_path=self.pretrained_model_name_or_path,
        )


class Images:
    """The images of the folder that the argument `field` names; `most`: the first ones only."""

    def __init__(self, arguments: DreamBoothArguments, field: str, most: int | None = None) -> None:
        self.field, self.seed, folder, size = field, arguments.seed, getattr(arguments, field), arguments.resolution
        self._data = load_image_data(
            folder, image_size=size, channels=3, hold_out=False, one_class=True, max_images_per_class=most
        )
        if len(self._data.class_names) != 1:
            names = ", ".join(self._data.class_names.values())
            raise ValueError(f"`{field}` is {folder!r}, with the folders {names}, expected images: name one of them.")
        (self.digest,) = self._data.digests().values()

    @torch.no_grad()
    def encode(self, vae: Any) -> None:
        """Keep mean and deviation of the latents of each image."""
        (label,), parts = self._data.class_names, []
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        for image in self._data.images(label):
            found = vae.encode(image[None].to(vae.device, torch.float32) / 127.5 - 1).latent_dist
            parts.append([((found.mean - shift) * scale).cpu(), (found.std * scale).cpu()])
        self.mean, self.std = (torch.cat(part) for part in zip(*parts, strict=True))
        self._order = EndlessOrder(len(parts), self.seed, self.field)

    def latents(self, start: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """Those from `start` on in an endless sequence, in which each round has an order of its own."""
        rows = self._order.entries(start, count)
        return self.mean[rows] + self.std[rows] * torch.randn(self.mean[rows].shape, generator=generator)


class DreamBooth:
    """A run: all is read, checked and drawn when it is made; `train` does the rest.

    Args:
        arguments: of the run.
        pipelines: classes that the objective knows.
        objective: makes it from the pipeline and the arguments.
    """

    def __init__(self, arguments: Any, pipelines: Sequence[type], objective: Callable[[Any, Any], Objective]) -> None:
        self.arguments, self.folder = arguments, Path(arguments.output_dir)
        config, adam = arguments.adapter_config(), _adam(arguments.use_8bit_adam)
        self.accelerator = make_accelerator(arguments)
        self.images = [Images(arguments, "instance_data_dir")]
        self._check_folder()
        name = arguments.pretrained_model_name_or_path
        files: dict[str, Any] = {"revision": arguments.revision, "variant": arguments.variant, "use_safetensors": True}
        if arguments.mixed_precision != "no":
            files["torch_dtype"] = {"fp16": torch.float16, "bf16": torch.bfloat16}[arguments.mixed_precision]
        self.pipe = DiffusionPipeline.from_pretrained(name, **files)
        self._check_pipeline(pipelines)
        self.objective = objective(self.pipe, arguments)
        self.repo_id: str | None = None
        if arguments.push_to_hub and self.accelerator.is_main_process:
            # Before any training, since there may be no such user, or no permission.
            self.repo_id = HubRepository(arguments.hub_model_id or self.folder.resolve().name).repo_id
        self._prepare()
        self.model = self.pipe.transformer if hasattr(self.pipe, "transformer") else self.pipe.unet
        self.model.requires_grad_(False)
        torch.manual_seed(derive_seed(arguments.seed, "adapter"))
        self.model.add_adapter(config)
        if arguments.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        trained = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        optimizer = adam(list(trained.values()), lr=arguments.learning_rate)
        ema = EMAModel(trained.values(), decay=arguments.ema_decay)
        self.state = TrainingState(trained, optimizer, ema, scaler=self.accelerator.scaler)

    def train(self, termination: Termination) -> None:
        """Train, save and push the adapter.

        Raises:
            NonFiniteLossError: the loss or its gradient is NaN or infinite; names the step.
            Terminated: SIGTERM or SIGINT has come; there is a checkpoint.
            PushError: the adapter is saved, but could not be pushed.
        """
        accelerator = self.accelerator
        with folder_lock(self.folder) if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                recover_folder(self.folder)
                write_json(self.folder / "settings.json", self.settings)
            accelerator.wait_for_everyone()
            accelerator.init_trackers("logs")
            self._train(termination)
            self.state.ema.copy_to(self.state.parameters.values())
            if accelerator.is_main_process:
                save_adapter(self.model, self.folder / "adapter")
                logger.info("The adapter is in %s", self.folder / "adapter")
                self._validate(self.arguments.max_train_steps)
                if self.repo_id is not None:
                    self._push(self.repo_id)
            accelerator.wait_for_everyone()
            accelerator.end_training()

    def loss(self, model: Callable[..., Any], number: int) -> torch.Tensor:
        """Of a batch of this process, by its number: that of the subject, and that of the class at its weight."""
        arguments, accelerator = self.arguments, self.accelerator
        size, process = arguments.train_batch_size, accelerator.process_index
        generator = generator_for(arguments.seed, "batch", number, process)
        start = (number * accelerator.num_processes + process) * size
        latents = torch.cat([one.latents(start, size, generator) for one in self.images]).to(accelerator.device)
        pairs = {key: [one[key].repeat_interleave(size, 0) for one in self.prompts] for key in self.prompts[0]}
        prompt = {key: torch.cat(pair) for key, pair in pairs.items()}
        with accelerator.autocast():
            losses = self.objective(model, latents, prompt, generator)
        weights = [1.0, arguments.prior_loss_weight]
        return sum(weight * part.mean() for weight, part in zip(weights, losses.split(size), strict=False))

    def _train(self, termination: Termination) -> None:
        arguments, accelerator, state = self.arguments, self.accelerator, self.state
        model = accelerator.prepare_model(self.model)
        # Without its wrapper for autocast, which is in `loss`: the pipeline draws as it does without training.
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        checkpoints, steps = self.folder / "checkpoints", arguments.max_train_steps
        done = load_newest(checkpoints, state) if arguments.resume_from_checkpoint else 0
        if done > steps:
            raise ValueError(f"`max_train_steps` is {steps}, but the run has done {done} already: pass more.")
        guard = GuardedSteps(state, accelerator, shared=True, max_grad_norm=arguments.max_grad_norm)
        bar = Progress(steps, "train", initial=done, disable=not accelerator.is_main_process)
        with bar, termination.deferred():
            for step in range(done + 1, steps + 1):
                rate = arguments.learning_rate * min(1.0, step / max(1, arguments.lr_warmup_steps))
                for group in state.optimizer.param_groups:
                    group["lr"] = rate
                loss = self._step(model, guard, step)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                accelerator.log({"loss": loss, "lr": rate}, step=step)
                requested = torch.tensor(int(termination.requested), device=accelerator.device)
                stops = step < steps and bool(accelerator.reduce(requested))  # of any process
                saves = stops or step == steps or step % arguments.checkpointing_steps == 0
                if saves and accelerator.is_main_process:
                    save_checkpoint(checkpoints, step, state, total_limit=arguments.checkpoints_total_limit)
                if stops:
                    raise termination.error(f"after step {step} of {steps}")
                if accelerator.is_main_process and step < steps and step % (arguments.validation_steps or steps) == 0:
                    self._validate(step)

    def _step(self, model: Any, guard: GuardedSteps, step: int) -> float:
        """One step of the optimizer, from 1; returns its loss."""
        losses, outcome, parts = [], torch.tensor(0), self.arguments.gradient_accumulation_steps
        guard.begin()
        for number in range((step - 1) * parts, step * parts):
            with self.accelerator.accumulate(model):
                loss = self.loss(model, number)
                losses.append(loss.detach())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    outcome = guard.end(losses)
        value = torch.stack(losses).mean().item()
        guard.count(Outcome(int(outcome)))
        if guard.exceed(0):
            found = "the gradient is not finite" if outcome == Outcome.NO_GRADIENT else f"the loss is {value}"
            remedy = "lower --learning_rate or change --mixed_precision, and start again with another --output_dir"
            raise NonFiniteLossError(f"In step {step}, {found}, so the run has ended: {remedy}.")
        return value

    def _validate(self, step: int) -> None:
        ema, trained, seed = self.state.ema, list(self.state.parameters.values()), self.arguments.seed
        ema.store(trained)
        ema.copy_to(trained)
        for index in range(self.arguments.num_validation_images if self.validation else 0):
            (image,) = self._draw(self.validation, [generator_for(seed, "validation", index)])
            with whole_file(self.folder / "validation" / f"step_{step}_{index}.png") as file:
                image.save(file, format="PNG")
        ema.restore(trained)

    def _push(self, repo_id: str) -> None:
        try:
            push_adapter(self.model, "default", repo_id, subfolder=None)
        except Exception as error:
            again = "the same command with --resume_from_checkpoint latest tries again"
            raise PushError(f"{self.folder / 'adapter'} was not pushed to {repo_id} ({error}): {again}.") from error

    def _check_pipeline(self, pipelines: Sequence[type]) -> None:
        path, name = self.arguments.pretrained_model_name_or_path, type(self.pipe).__name__
        if type(self.pipe) not in pipelines:
            known = " or ".join(one.__name__ for one in pipelines)
            raise ValueError(
                f"`pretrained_model_name_or_path` {path!r} is a {name}, expected a {known}: train_dreambooth_funlora.py is for Stable "
                "Diffusion and SDXL, train_dreambooth_funlora_sd3.py for SD3 and Flux."
            )
        # Transformers take patches of 2 x 2 latents.
        multiple = self.pipe.vae_scale_factor * (2 if hasattr(self.pipe, "transformer") else 1)
        if (size := self.arguments.resolution) % multiple:
            raise ValueError(f"`resolution` is {size}, expected a multiple of {multiple} for a {name}.")

    def _check_folder(self) -> None:
        """Raise an error unless the folder is empty, or has a run with the same settings to go on with."""
        given = {name: value for name, value in asdict(self.arguments).items() if name not in _FREE}
        self.settings = {**given, "images": self.images[0].digest}
        file, resume = self.folder / "settings.json", self.arguments.resume_from_checkpoint is not None
        there = sorted(path.name for path in self.folder.glob("[!.]*"))
        if there and not (resume and file.is_file()):
            ways = "another one" + ", or --resume_from_checkpoint latest to go on" * file.is_file()
            raise FileExistsError(f"`output_dir` {str(self.folder)!r} has {', '.join(there)} in it: pass {ways}.")
        if there and (changed := "; ".join(told(differences(read_mapping(file), self.settings)))):
            ways = "the same ones, or another --output_dir"
            raise ValueError(
                f"The run in `output_dir` {str(self.folder)!r} has other settings ({changed}): pass {ways}."
            )
        self.accelerator.wait_for_everyone()

    def _prepare(self) -> None:
        """Encode prompts, draw missing images of the class, encode images. Text encoders leave the device before the rest comes."""
        arguments, pipe = self.arguments, self.pipe
        pipe.set_progress_bar_config(disable=True)
        encoders = [name for name in pipe.components if name.startswith("text_encoder")]
        for name in encoders:
            getattr(pipe, name).to(self.accelerator.device)
        self.prompts = [self._encode(text) for text in (arguments.instance_prompt, arguments.class_prompt) if text]
        self.validation = self._encode(arguments.validation_prompt) if arguments.validation_prompt else None
        for name in [*encoders, "safety_checker"]:
            if name in pipe.components:
                setattr(pipe, name, None)
        pipe.to(self.accelerator.device)
        if arguments.class_data_dir is not None:
            names = (
                "pretrained_model_name_or_path",
                "revision",
                "resolution",
                "num_inference_steps",
                "seed",
            )
            draw_missing(
                Path(arguments.class_data_dir),
                arguments.num_class_images,
                lambda _, generators: self._draw(self.prompts[1], generators),
                prompts=[arguments.class_prompt],
                origin={name: getattr(arguments, name) for name in names},
                sample_batch_size=arguments.sample_batch_size,
                seed=arguments.seed,
                accelerator=self.accelerator,
            )
            self.images.append(Images(arguments, "class_data_dir", arguments.num_class_images))
        dtype = pipe.vae.dtype
        pipe.vae.float()  # some overflow in float16
        for images in self.images:
            images.encode(pipe.vae)
        if dtype != torch.float32:
            pipe.vae.to(dtype)

    @torch.no_grad()
    def _encode(self, prompt: str) -> Prompt:
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        others: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in taken}
        if guided := "do_classifier_free_guidance" in taken:
            others["do_classifier_free_guidance"] = True
        found = self.pipe.encode_prompt(prompt, device=self.accelerator.device, num_images_per_prompt=1, **others)
        return dict(zip(_EMBEDDINGS if guided else _EMBEDDINGS[::2], found, strict=False))

    @torch.no_grad()
    def _draw(self, prompt: Prompt, generators: list[torch.Generator]) -> list[Any]:
        options: dict[str, Any] = {key: one.repeat_interleave(len(generators), 0) for key, one in prompt.items()}
        if self.arguments.num_inference_steps is not None:
            options["num_inference_steps"] = self.arguments.num_inference_steps
        size = self.arguments.resolution
        return self.pipe(**options, height=size, width=size, generator=generators).images


def _adam(eight_bit: bool) -> Callable[..., torch.optim.Optimizer]:
    if not eight_bit:
        return torch.optim.Adam
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as error:
        raise ImportError(f"`use_8bit_adam` needs bitsandbytes ({error}): install it, or leave this out.") from error
    return Adam8bit


@warnings_as_lines()
def main(kind: Any, pipelines: Sequence[type], objective: Callable[[Any, Any], Objective], description: str) -> None:
    """The command: a run of `DreamBooth` with arguments of this kind. Exit codes are those of `funlora train`."""
    set_up_logging()
    parser = HfArgumentParser(kind, usage="%(prog)s [-h] [--OPTION VALUE ...]", description=description)
    tidy_help(parser)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            return_remaining_strings=True, look_for_args_file=False
        )
        refuse_unknown(parser, unknown)
        with Termination() as termination:
            DreamBooth(arguments, pipelines, objective).train(termination)
    except Terminated as terminated:
        print(terminated, file=sys.stderr)
        raise
    except ERRORS as error:
        sys.exit(f"error: {error}")
