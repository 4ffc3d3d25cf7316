"""The arguments of a run of concepts: dataclasses for `transformers.HfArgumentParser`, validated at construction.

The defaults are those of the run on the package's tiny base.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from ..continual.config import LoopArguments
from ..continual.learning import LR_SCHEDULERS
from ..tuner import FunLoraConfig
from ..utils.checks import check_not_mistyped, expanded
from ..utils.field_types import Count, LearningRate, Natural, Positive, Range, Share, check_field_types, one_of


TINY = "tiny"


def _argument(default: Any, help: str) -> Any:
    """Make a field with the text that `HfArgumentParser` shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class ConceptArguments:
    """The base, the concepts to learn, and what is trained for each."""

    _argument_group_name = "base and concepts"

    pretrained_model_name_or_path: str = _argument(
        TINY,
        "Pipeline of Stable Diffusion, SDXL, SD3, PixArt or Flux: folder or repository; 'tiny': the package's own base.",
    )
    revision: str | None = _argument(None, "Branch, tag or commit of the pipeline.")
    variant: str | None = _argument(None, "Variant of its files, such as 'fp16'.")
    drop_t5: bool = _argument(False, "Load SD3 without its T5.")
    concepts: str = _argument(
        TINY,
        "concepts.json, as Custom Diffusion's; a folder with one folder of images a concept, or with images of one; or a data set on the Hub.",
    )
    instance_prompt: str | None = _argument(
        None, "Prompt of the images, with the token, if `concepts` is one folder of images or a data set."
    )
    concept_order: list[str] | None = _argument(
        None, "Names of the concepts to learn, in this order; None: all, in the order of the file."
    )
    resolution: Count | None = _argument(
        None, "Height and width to which images are scaled and cropped; None: the base's."
    )
    random_flip: bool = _argument(False, "Flip images at random, left to right.")

    target_modules: list[str] | None = _argument(
        None,
        "Layers to adapt: 'kv', 'cross', 'attention', 'convolutions', or names of layers; None: those of the strategy.",
    )
    rank: Count | None = _argument(None, "Rank of A B; None: 1 for funlora, else 4.")
    function: str = _argument("cosine", "Of funlora: 'cosine', 'power', 'shift' or 'identity'.")
    num_functions: int = _argument(10, "Of funlora: the number of functions summed up.")
    ratio: int = _argument(2, "Of funlora: A and B have one entry for so many neighbouring channels.")
    num_vectors: Count = _argument(1, "Rows of each new token.")
    train_token: bool = _argument(True, "Train the token's row; without, it stays a copy of its initializer's.")

    with_prior_preservation: bool = _argument(False, "Also train on images of the concept's class.")
    num_class_images: Count = _argument(100, "How many of them; missing ones are drawn by the base.")
    prior_loss_weight: Annotated[float, Range(0, 1e6)] = _argument(1.0, "Weight of their loss.")
    snr_gamma: Positive | None = _argument(None, "Min-SNR weights of the loss, such as 5; None: none.")
    noise_offset: Annotated[float, Range(0, 10)] = _argument(0.0, "Weight of noise that is constant in a channel.")

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        check_field_types(self)
        for name in ("pretrained_model_name_or_path", "concepts"):
            setattr(self, name, expanded(name, getattr(self, name)))
        if self.pretrained_model_name_or_path != TINY:
            check_not_mistyped(
                "pretrained_model_name_or_path", self.pretrained_model_name_or_path, revision=self.revision
            )
        for name in ("revision", "variant"):
            if (value := getattr(self, name)) is not None and self.pretrained_model_name_or_path == TINY:
                raise ValueError(
                    f"`{name}` is {value!r}, but the package's own base has none: leave it out, or name another base."
                )
        if self.target_modules == []:
            raise ValueError(
                "`target_modules` is [], expected names of layers, or None: `strategy` textual_inversion has none."
            )
        for name, default in (("num_class_images", 100), ("prior_loss_weight", 1.0)):
            if (value := getattr(self, name)) != default and not self.with_prior_preservation:
                raise ValueError(
                    f"`{name}` is {value!r} but there is no `with_prior_preservation`: pass it, too, or leave both out."
                )
        FunLoraConfig(function=self.function, num_functions=self.num_functions, ratio=self.ratio)


@dataclass
class ConceptTrainingArguments(LoopArguments):
    """How each concept is trained, and where the run is written."""

    output_dir: str = _argument("outputs/concepts", "Folder of the run.")
    gradient_checkpointing: bool = _argument(False, "Compute activations again in the backward pass, to save memory.")
    concept_train_steps: Count | None = _argument(250, "Steps of a concept; None: epochs count.")
    concept_epochs: Count | None = _argument(None, "Epochs of a concept, if the steps are None.")
    concept_batch_size: Count = _argument(8, "Images of the concept in a batch, over all processes.")
    concept_learning_rate: LearningRate | None = _argument(
        None, "Peak learning rate of the adapted layers; None: that of the strategy for this base."
    )
    token_learning_rate: LearningRate | None = _argument(
        None,
        "Peak learning rate of the token's row; None: 2e-2 for the tiny base (6e-2 if nothing else is trained), else 5e-4, of layers 1e-3.",
    )
    concept_warmup_steps: Natural = _argument(10, "Steps of linear warm-up.")
    concept_lr_scheduler: Annotated[str, one_of(*LR_SCHEDULERS)] = _argument(
        "cosine", "The rate after the warm-up: 'constant', 'linear' or 'cosine', the last two to 0."
    )
    concept_weight_decay: Share = _argument(0.0, "Decay of AdamW.")
    concept_ema_decay: Share = _argument(0.98, "Decay of the moving average, which is kept.")
    concept_ema_warmup: bool = _argument(True, "After s averaged steps, the decay is at most (1 + s) / (10 + s).")
    concept_ema_start: Share = _argument(0.0, "Share of the steps after which averaging starts.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_phase("concept")


@dataclass
class ConceptEvaluationArguments:
    """How the learned concepts are sampled and scored."""

    _argument_group_name = "evaluation"

    evaluation: bool = _argument(True, "Sample and score the concepts after each task.")
    num_samples_per_prompt: Count = _argument(4, "Images of each prompt.")
    sampling_batch_size: Count = _argument(24, "Images drawn at once.")
    num_inference_steps: Count = _argument(16, "Steps of the pipeline's scheduler for each image.")
    guidance_scale: Annotated[float, Range(1, 100)] = _argument(
        2.5, "Classifier-free guidance; 1: none. Of FLUX.1-dev, the embedded one."
    )
    clip_model: str | None = _argument(
        None, "CLIPModel for CLIP-I and CLIP-T, folder or repository; None: the tiny one for the tiny base, else none."
    )
    dino_model: str | None = _argument(None, "ViT or DINOv2 for DINO-I, folder or repository; None: no such score.")

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("clip_model", "dino_model"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, expanded(name, value))


CONCEPT_ARGUMENTS: tuple[Any, ...] = (ConceptArguments, ConceptTrainingArguments, ConceptEvaluationArguments)
