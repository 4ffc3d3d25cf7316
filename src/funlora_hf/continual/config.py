"""The arguments of a run: dataclasses for `transformers.HfArgumentParser`, validated at construction.

The defaults are those of the run on digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from huggingface_hub.utils import validate_repo_id

from ..adapters.untrusted_base import check_unet_config, check_velocity_unet
from ..classifier import ARCHITECTURES, BatchSize, ClassifierConfig, CropPadding
from ..flow_matching import TIMESTEP_DENSITIES
from ..recipes.reading import load_yaml
from ..sampling.solvers import SOLVERS
from ..tuner import FunLoraConfig
from ..tuner.learning_rates import ALPHA_RATE
from ..utils.checks import check_at_least_one, check_class_label, expanded, shortened
from ..utils.field_types import Count, LearningRate, Natural, Positive, Range, Share, check_field_types, one_of


UPDATE_MODES = ("continue", "retrain", "cold")
COLD, MEAN = "cold", "mean"
SAMPLE, EXPECTED = TARGETS = ("sample", "expected")
LATEST = "latest"

DIGITS_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


TimestepDensity = Annotated[str, one_of(*TIMESTEP_DENSITIES)]
_DENSITIES = "'uniform', 'stratified' (uniform, but evenly spread over a batch) or 'logit_normal'."


def _argument(default: Any, help: str) -> Any:
    """Make a field with the text that `HfArgumentParser` shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class DataArguments:
    """Which images, and how their classes are split into tasks."""

    # The title in `--help`, which HfArgumentParser reads.
    _argument_group_name = "data"

    dataset_name: str = _argument("digits", "'digits' (scikit-learn), a folder, a parquet file or a Hub dataset.")
    dataset_config_name: str | None = _argument(None, "Configuration of a dataset on the Hub.")
    dataset_revision: str | None = _argument(None, "Branch, tag or commit of a dataset.")
    image_column: str | None = _argument(None, "Column of the images; found if it is clear.")
    label_column: str | None = _argument(None, "Column of the labels; found if it is clear.")
    train_split: str = _argument("train", "Split to train on.")
    test_split: str | None = _argument(None, "Split to test on; None: 'test' or 'validation', else held out.")
    validation_fraction: float | None = _argument(None, "Test on this share of training images, to choose settings.")
    max_images_per_class: Count | None = _argument(None, "Take only the first N of every class.")
    random_flip: bool = _argument(False, "Flip training images at random, left to right.")
    classes_per_task: Count = _argument(2, "Classes that each task brings.")
    num_tasks: Count | None = _argument(None, "Stop after this many tasks; None: all of them.")
    class_order_seed: Natural | None = _argument(
        None, "Shuffle the classes with this seed; None: the dataset's order."
    )
    class_order: list[str] | None = _argument(
        None, "All classes, by id or name, in the order in which they are learned; None: the dataset's order."
    )

    def __post_init__(self) -> None:
        if isinstance(self.class_order, list):
            # YAML reads ids as numbers.
            self.class_order = [str(entry) if type(entry) is int else entry for entry in self.class_order]
        check_field_types(self)
        self.dataset_name = expanded("dataset_name", self.dataset_name)
        if self.class_order is not None and self.class_order_seed is not None:
            raise ValueError(
                f"`class_order` and `class_order_seed` {self.class_order_seed} are both given, expected one of them: leave one out."
            )
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` is {self.validation_fraction}, expected a share between 0 and 1.")


@dataclass
class ModelArguments:
    """The base and its adapters."""

    _argument_group_name = "base and adapters"

    base_model: str | None = _argument(None, "Pipeline (folder or repository) to add classes to; skips task 1.")
    base_model_revision: str | None = _argument(None, "Branch, tag or commit of the base.")
    unet_config: dict | str | None = _argument(
        None, "UNet2DModel's arguments, as a mapping in a recipe or as JSON; None: a small one for digits."
    )
    peft_method: str = _argument(
        "funlora",
        "'funlora', or one of the paper's comparison methods: 'class_vector', 'vanilla_add', 'vanilla_mul', "
        "'scale_shift', 'lora_attention', 'lora_attention_fused', 'lora_conv_v1', 'lora_conv_v2'.",
    )
    function: str = _argument("cosine", "'cosine', 'power', 'shift' or 'identity'.")
    num_functions: int = _argument(10, "The number p of functions summed up.")
    train_omega: bool = _argument(True, "Learn the frequencies or exponents.")
    operation: str = _argument("mul", "'mul', 'add' or 'mul-add'.")
    rank: Count | None = _argument(None, "Rank of A B; None: 1, of LoRA on attention 2, of a LoRA for all classes 8.")
    ratio: int = _argument(1, "One entry of A and B for this many neighbouring channels.")
    target_modules: list[str] | None = _argument(
        None,
        "Modules to adapt: names; one regex; 'all', 'decoder', 'decoder-middle', 'attention', or a range of convolutions "
        "in order of execution as '40-54'; None: the decoder's middle.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.unet_config, str):
            try:
                self.unet_config = json.loads(self.unet_config)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"`unet_config` is {shortened(repr(self.unet_config), 100)}, expected a JSON mapping: {error}."
                ) from error
        if self.unet_config is not None and not isinstance(self.unet_config, dict):
            raise ValueError(
                f"`unet_config` is {shortened(repr(self.unet_config), 100)}, expected a mapping of UNet2DModel arguments."
            )
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        check_field_types(self)
        if self.base_model is not None:
            self.base_model = expanded("base_model", self.base_model)
        if self.unet_config is not None:
            if (kind := self.unet_config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
                raise ValueError(
                    f"`unet_config` is that of a {shortened(str(kind), 100)}, expected that of a UNet2DModel: to learn on a text-to-image "
                    "pipeline, name its folder by --strategy diffclass --strategy_options pretrained=FOLDER."
                )
            if "num_class_embeds" in self.unet_config:
                raise ValueError(
                    f"`unet_config.num_class_embeds` is {self.unet_config['num_class_embeds']!r}, which follows from the classes of "
                    "task 1: leave it out."
                )
            check_unet_config(self.unet_config, field="unet_config")
            check_velocity_unet(self.unet_config, field="unet_config")
            _check_halving(self.unet_config)
        if self.target_modules == []:
            raise ValueError(
                "`target_modules` is [], expected names of modules, or None: `peft_method` 'class_vector' adapts no module."
            )
        if self.base_model is None and self.base_model_revision is not None:
            raise ValueError(
                f"`base_model_revision` is {self.base_model_revision!r}, but there is no `base_model`: name it, or leave both out."
            )
        self.funlora_config()

    @property
    def unet(self) -> dict[str, Any]:
        """The arguments of the UNet2DModel; if none are given, those for digits."""
        return self.unet_config if isinstance(self.unet_config, dict) else DIGITS_UNET

    def funlora_config(self, **kwargs: Any) -> FunLoraConfig:
        """Return the FunLoRA config of these arguments, without rank and targets; `kwargs` override or add fields."""
        names = ("function", "num_functions", "train_omega", "operation", "ratio")
        given = {name: getattr(self, name) for name in names}
        return FunLoraConfig(**{**given, "class_embedding": "class_embedding", **kwargs})


@dataclass
class LoopArguments:
    """The arguments of the loop, whatever a run learns."""

    _argument_group_name = "training"

    output_dir: str = _argument("outputs/digits", "Folder of the run.")
    overwrite_output_dir: bool = _argument(False, "Delete the run that is in the folder.")
    resume_from_checkpoint: str | None = _argument(None, "'latest': go on where a run stopped.")
    strategy: str = _argument("funlora", "How to learn one task after another.")
    strategy_options: list[str] | None = _argument(
        None, "Options of the strategy as key=value; in a recipe, a mapping. See docs/strategies."
    )
    seed: int = _argument(0, "Seed of everything: weights, order, noise, samples, classifier.")
    deterministic: bool = _argument(True, "Use deterministic kernels on a GPU, too (slower).")
    mixed_precision: Annotated[str, one_of("no", "fp16", "bf16")] = _argument("no", "'no', 'fp16' or 'bf16'.")
    gradient_accumulation_steps: Count = _argument(1, "Batches summed up for one step.")
    max_grad_norm: Annotated[float, Range(0, above=True, why="None does not clip")] | None = _argument(
        1.0, "Clip the gradient's norm to this, above 0; None does not."
    )
    max_nonfinite_steps: Natural = _argument(
        10,
        "Steps in a row that are skipped for a loss or gradient that is not finite; one more stops the run. 0: the first.",
    )
    timestep_density: TimestepDensity = _argument("uniform", _DENSITIES)
    max_train_steps: Count | None = _argument(None, "Cap on the steps of every phase: base, each class, classifier.")
    checkpointing_steps: Count = _argument(500, "Steps between checkpoints inside a phase.")
    checkpoints_total_limit: Count | None = _argument(
        2,
        "How many checkpoints of a phase to keep, the oldest going first; a damaged one falls back to the one before; None: all.",
    )
    time_limit_minutes: Annotated[float, Range(0, above=True, why="None is no limit")] | None = _argument(
        None,
        "From this time after its start, the run begins no step and no evaluation of a task: it writes a "
        "checkpoint and stops, with the exit code 75. None: no limit.",
    )
    report_to: str = _argument("none", "Tracker of accelerate: 'tensorboard', 'wandb', ...")
    push_to_hub: bool = _argument(False, "Push what is learned to the Hub: a tagged commit after each task.")
    hub_model_id: str | None = _argument(
        None, "Repository to push to, 'user/repo'; None: yours, named like output_dir."
    )
    hub_private_repo: bool | None = _argument(
        None, "Whether a new repository is private; None: as your account is set."
    )
    hub_license: str | None = _argument(None, "Identifier of a licence for the cards: 'mit', ...")

    def __post_init__(self) -> None:
        # HfArgumentParser has no type for what is a list on the command line and a mapping in a recipe.
        self.strategy_options = parse_options(self.strategy_options)  # type: ignore[assignment]
        check_field_types(self, leave_out=["strategy_options"])
        self.output_dir = expanded("output_dir", self.output_dir)
        if self.resume_from_checkpoint not in (None, LATEST):
            raise ValueError(
                f"`resume_from_checkpoint` is {self.resume_from_checkpoint!r}, expected 'latest': a run goes on from "
                "the newest checkpoint of `output_dir`."
            )
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise ValueError("`overwrite_output_dir` and `resume_from_checkpoint` exclude each other: pass one.")
        self._check_hub()

    def _check_hub(self) -> None:
        for name in ("hub_model_id", "hub_private_repo", "hub_license"):
            if (value := getattr(self, name)) is not None and not self.push_to_hub:
                raise ValueError(f"`{name}` is {value!r} but `push_to_hub` is not set: set it, or leave both out.")
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except ValueError as error:
                raise ValueError(f"`hub_model_id` is {self.hub_model_id!r}, expected 'user/repo': {error}") from error

    def _check_phase(self, phase: str) -> None:
        steps, epochs = getattr(self, f"{phase}_train_steps"), getattr(self, f"{phase}_epochs")
        if (steps is None) == (epochs is None):
            raise ValueError(
                f"`{phase}_train_steps` is {steps} and `{phase}_epochs` is {epochs}, expected exactly one of them: set "
                "the other to null."
            )
        if getattr(self, f"{phase}_ema_decay") == 1 and not getattr(self, f"{phase}_ema_warmup"):
            raise ValueError(
                f"`{phase}_ema_decay` is 1 without `{phase}_ema_warmup`, so that the average never changes, expected less."
            )


@dataclass
class ContinualTrainingArguments(LoopArguments):
    """How each phase of a run of classes is trained, and where the run is written."""

    timestep_density: TimestepDensity = _argument("stratified", _DENSITIES)
    channels_last: bool = _argument(False, "U-Net and images in torch.channels_last: faster on GPUs in fp16 and bf16.")
    torch_compile: bool = _argument(False, "Compile the U-Net's blocks for training, once for all classes.")
    class_batches: Annotated[str, one_of("homogeneous", "mixed")] = _argument(
        "homogeneous", "'homogeneous': one class after another, one effective weight a step. 'mixed': together."
    )

    base_train_steps: Count | None = _argument(700, "Steps of task 1; None: base_epochs counts.")
    base_epochs: Count | None = _argument(None, "Epochs of task 1, if base_train_steps is None.")
    base_batch_size: Count = _argument(32, "Batch of task 1, over all processes.")
    base_learning_rate: LearningRate = _argument(1e-3, "Peak learning rate of task 1.")
    base_warmup_steps: Natural = _argument(20, "Steps of linear warm-up in task 1.")
    base_ema_decay: Share = _argument(0.99, "Decay of the moving average in task 1.")
    base_ema_warmup: bool = _argument(
        True, "After s averaged steps of task 1, the decay is at most (1 + s) / (10 + s)."
    )
    base_ema_start: Share = _argument(0.0, "Share of task 1 after which averaging starts.")
    adapter_train_steps: Count | None = _argument(100, "Steps of a class; None: epochs count.")
    adapter_epochs: Count | None = _argument(None, "Epochs of a class, if the steps are None.")
    adapter_batch_size: Count = _argument(32, "Batch of an adapter phase.")
    adapter_learning_rate: LearningRate = _argument(3e-2, "Peak learning rate of a class.")
    adapter_adam_beta1: Annotated[float, Range(0, 0.99)] = _argument(0.5, "Adam's beta1 for a class.")
    adapter_alpha_rate: Positive | None = _argument(
        None,
        f"Rate of FunLoRA's alpha, as a multiple of adapter_learning_rate; None: {ALPHA_RATE:g}, where there is one.",
    )
    adapter_omega_rate: Positive = _argument(1.0, "The same of its omega.")
    adapter_vector_rate: Positive = _argument(1.0, "The same of the class vector.")
    adapter_start: Annotated[str, one_of(COLD, MEAN)] = _argument(
        COLD, "Where a new class starts: 'cold', as the base, or 'mean', at the mean of the adapters of earlier tasks."
    )
    adapter_target: Annotated[str, one_of(*TARGETS)] = _argument(
        SAMPLE,
        "Velocity that a class learns: 'sample', of each image and its noise, or 'expected', its mean given the noisy image.",
    )
    adapter_pairs: bool = _argument(False, "Train a class on pairs of the same image and time with opposite noise.")
    adapter_warmup_steps: Natural = _argument(0, "Steps of linear warm-up of a class.")
    adapter_ema_decay: Share = _argument(0.98, "Decay of the moving average of a class.")
    adapter_ema_warmup: bool = _argument(
        True, "After s averaged steps of a class, the decay is at most (1 + s) / (10 + s)."
    )
    adapter_ema_start: Share = _argument(0.0, "Share of a class after which averaging starts.")
    update_class: int | None = _argument(None, "Train the adapter of this one class again; nothing else changes.")
    update_mode: Annotated[str, one_of(*UPDATE_MODES)] = _argument(
        "continue",
        "'continue' from the adapter there is, 'retrain' from where the class started, or 'cold' from the base.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_update()
        for phase in ("base", "adapter"):
            self._check_phase(phase)
        if self.adapter_pairs and self.adapter_batch_size % 2:
            raise ValueError(
                f"`adapter_batch_size` is {self.adapter_batch_size}, expected an even number with `adapter_pairs`: change it by one."
            )

    def _check_update(self) -> None:
        if self.update_class is None:
            if self.update_mode != UPDATE_MODES[0]:
                raise ValueError(
                    f"`update_mode` is {self.update_mode!r}, but there is no `update_class`: name it, or leave both out."
                )
            return
        check_class_label(self.update_class, field="update_class")
        for name, instead in (
            ("push_to_hub", "update the class, then `funlora push`"),
            ("overwrite_output_dir", "leave it out"),
        ):
            if getattr(self, name):
                raise ValueError(f"`{name}` is set and `update_class` given, expected one of them: {instead}.")


@dataclass
class EvaluationArguments:
    """How the learned classes are sampled and evaluated."""

    _argument_group_name = "evaluation"

    evaluation: bool = _argument(
        True, "Sample and judge the classes after each task; without, `funlora evaluate` does so later."
    )
    num_samples_per_class: Count = _argument(250, "Images sampled of every class.")
    sampling_batch_size: Count = _argument(250, "Images sampled at once.")
    solver: Annotated[str, one_of(*SOLVERS)] = _argument("heun", "'euler', 'heun', 'rk4' or 'dopri5'.")
    num_inference_steps: Count = _argument(6, "Steps of the solver; 'dopri5' chooses its own.")
    guidance_scale: Annotated[float, Range(0)] = _argument(
        1.0, "Guidance away from the base, for twice the evaluations, as in FunLoraPipeline; 1: none."
    )
    solver_tolerance: Positive = _argument(1e-5, "rtol and atol of 'dopri5'.")
    num_probe_samples: Count = _argument(8, "Images of every class drawn when it is learned and again at the end.")
    held_out_sigmas: Count = _argument(16, "Times at which the held-out loss is measured.")
    classifier_architecture: Annotated[str, one_of(*ARCHITECTURES)] = _argument(
        "auto", "'resnet18', 'cnn' (small) or 'auto': 'cnn' below 32 pixels."
    )
    classifier_epochs: Count = _argument(20, "Epochs of the classifier.")
    classifier_batch_size: BatchSize = _argument(100, "Batch of the classifier.")
    classifier_learning_rate: Positive = _argument(0.1, "Peak learning rate of the classifier.")
    classifier_crop_padding: CropPadding = _argument(0, "Padding of the random crop, in pixels.")
    classifier_flip: bool = _argument(False, "Flip the classifier's images at random.")
    image_quality: Annotated[str, one_of("classifier", "inception", "none")] = _argument(
        "classifier",
        "Features in which Frechet distance, precision and recall are measured at the end: of a 'classifier' "
        "trained on all real images, of 'inception' (FID; needs the extra fid), or 'none'.",
    )
    image_quality_neighbours: Count = _argument(5, "Neighbours that set the radius of precision and recall.")
    joint_results: str | None = _argument(None, "results.json of a joint run, drawn beside the accuracy if it exists.")

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.joint_results is not None:
            self.joint_results = expanded("joint_results", self.joint_results)

    def classifier(self, max_train_steps: int | None = None) -> ClassifierConfig:
        """Return how classifiers are trained, for at most `max_train_steps` steps."""
        prefix = "classifier_"
        own = {name.removeprefix(prefix): value for name, value in vars(self).items() if name.startswith(prefix)}
        return ClassifierConfig(horizontal_flip=own.pop("flip"), max_train_steps=max_train_steps, **own)


# The arguments of a run, in the order in which `RunArguments` takes them.
ARGUMENTS: tuple[Any, ...] = (DataArguments, ModelArguments, ContinualTrainingArguments, EvaluationArguments)


def parse_options(given: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any] | None:
    """Return `key=value` texts as a mapping, with values read as in a recipe, and a mapping as it is; None if it is empty."""
    if isinstance(given, Mapping):
        return dict(given) or None
    if not isinstance(given, (list, type(None))) or not all(isinstance(text, str) for text in given or ()):
        raise ValueError(
            f"`strategy_options` is {shortened(repr(given), 100)}, expected key=value, or in a recipe a mapping."
        )
    options = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key or key in options:
            raise ValueError(f"`strategy_options` has {text!r}, expected key=value, with each key once.")
        try:
            options[key] = parse_value(value)
        except ValueError as error:
            raise ValueError(f"`strategy_options` has {text!r}, expected a value in YAML: {error}.") from error
    return options or None


def parse_value(text: str) -> Any:
    """Read a value of the command line as in a recipe.

    Raises:
        ValueError: it is not YAML.
    """
    # YAML 1.1 reads 2e-3 and 1.5e3, which lack a point or a sign, as text.
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", text):
        return float(text)
    return load_yaml(text)


def run_settings(*arguments: Any) -> dict[str, Any]:
    """Return the arguments of a run as one JSON-able mapping, by dataclass; a resumed run has to match it."""
    return {type(part).__name__: json.loads(json.dumps(asdict(part))) for part in arguments}


def measuring_settings(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `EvaluationArguments` on which samples and measurements after each task depend; others are for the end."""
    of_the_end = ("evaluation", "image_quality", "image_quality_neighbours", "joint_results")
    return {name: value for name, value in evaluation.items() if name not in of_the_end}


def _check_halving(unet_config: dict) -> None:
    channels = unet_config.get("block_out_channels", (0, 0, 0, 0))
    if not isinstance(channels, (list, tuple)) or not channels:
        raise ValueError(
            f"`unet_config.block_out_channels` is {channels!r}, expected a list: the channels of each block."
        )
    blocks = len(channels)
    size = unet_config.get("sample_size")
    check_at_least_one("unet_config.sample_size", size)
    factor = 2 ** (blocks - 1)
    if size % factor:
        raise ValueError(
            f"`unet_config.sample_size` is {size}, which a U-Net of {blocks} blocks cannot halve {blocks - 1} times: "
            f"choose a multiple of {factor}, or fewer blocks."
        )
