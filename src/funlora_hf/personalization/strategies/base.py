"""What all strategies of concepts share: the setting, the rows of tokens, the loss, the folder of a concept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import PeftConfig
from torch import nn

from ...continual.learning import LearningSetting, LearningStrategy, Phase, PhaseSettings, Trainable
from ...data.tasks import Task
from ...text_to_image.model import LAYERS, TextToImageModel
from ...text_to_image.objective import Objective
from ...text_to_image.token_rows import TokenRows
from ...utils.files import whole_folder
from ..arguments import TINY, ConceptArguments, ConceptTrainingArguments
from ..batches import ConceptBatch
from ..concept_folder import CONCEPT_FILE, write_concept
from ..concepts import Concept
from ..run_folder import PHASE


@dataclass(frozen=True)
class ConceptSetting(LearningSetting):
    """What a strategy may know of a run of concepts.

    It also has the fields of [`LearningSetting`], whose classes are the concepts.

    Args:
        model: the base, with a row for every concept's token.
        concepts: id -> concept.
        arguments: what is trained for each concept.
        objective: the loss.
    """

    training: ConceptTrainingArguments
    model: TextToImageModel
    concepts: Mapping[int, Concept]
    arguments: ConceptArguments
    objective: Objective

    @property
    def is_tiny(self) -> bool:
        """Whether the base is the package's own."""
        return self.arguments.pretrained_model_name_or_path == TINY


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of a strategy: on the tiny base, as measured, and on any other, by its source or a guess."""

    tiny: float
    other: float


class ConceptStrategy(LearningStrategy):
    """How to learn one concept after another. The row of a concept's token is trained in its own task only."""

    takes: ClassVar[tuple[str, ...]] = ("target_modules", "rank")
    """Which of "target_modules", "rank", "function", "num_functions" and "ratio" it uses."""
    rates: ClassVar[Rates | None]
    """Of the adapted layers; None: there are none."""
    token_rates = Rates(2e-2, 5e-4)
    in_model: ClassVar[bool] = False
    """Whether what it learns of a concept, but the token's rows, is in `model/`, not in the concept's folder."""
    layerwise: ClassVar[bool] = False
    """Whether a token has rows for each cross-attention layer; for Stable Diffusion only."""
    default_layers: ClassVar[str] = "cross"
    """The layers that are adapted if `target_modules` is None, a kind of `TextToImageModel.layers`."""
    setting: ConceptSetting

    def __init__(self, setting: ConceptSetting) -> None:
        self.setting, self.model = setting, setting.model
        self.options = self.make_options(setting.training.strategy_options or {})
        self.concepts_dir = setting.output_dir / "concepts"
        self._starts = {name: row.detach().clone() for name, row in self.rows.named_parameters()}
        self._loaded: set[str] = set()

    @property
    def rows(self) -> TokenRows:
        """The rows of all tokens."""
        return cast("TokenRows", self.model.rows)

    def check(self) -> None:
        given, defaults = self.setting.arguments, {one.name: one.default for one in fields(ConceptArguments)}
        for name in ("target_modules", "rank", "function", "num_functions", "ratio"):
            if name not in self.takes and (value := getattr(given, name)) != defaults[name]:
                raise ValueError(f"`{name}` is {value!r}, which `strategy` {self.name!r} does not use: leave it out.")
        if self.rates is None and (rate := self.setting.training.concept_learning_rate) is not None:
            raise ValueError(
                f"`concept_learning_rate` is {rate}, but `strategy` {self.name!r} trains tokens only: give `token_learning_rate`."
            )
        if not given.train_token and (rate := self.setting.training.token_learning_rate) is not None:
            raise ValueError(f"`token_learning_rate` is {rate}, but `train_token` is False: leave one of the two out.")
        if self.rates is None and not given.train_token:
            raise ValueError(f"`train_token` is False, but `strategy` {self.name!r} trains nothing else.")
        self.target_modules()

    def target_modules(self) -> list[str]:
        """Return the names of the layers that are adapted, in the denoiser's order; none for a strategy without."""
        if self.rates is None:
            return []
        given = self.setting.arguments.target_modules or [self.default_layers]
        names: set[str] = set()
        known = {
            name for name, module in self.model.denoiser.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
        }
        for one in given:
            found = (
                self.model.layers(one) if one in LAYERS else [n for n in known if n == one or n.endswith(f".{one}")]
            )
            if not found:
                raise ValueError(
                    f"`target_modules` has {one!r}, which names no layer of the base: take some of {', '.join(map(repr, LAYERS))}, "
                    "or names of convolutions and linear layers."
                )
            names |= set(found)
        return [name for name, _ in self.model.denoiser.named_modules() if name in names]

    @property
    def mixture_power(self) -> float | None:
        """The power by which a prompt weights the adapters of all concepts; None: those of its tokens act in full."""
        return None

    @property
    def rank(self) -> int:
        """The rank of A B."""
        return self.setting.arguments.rank or 4

    def phases(self, task: Task) -> list[Phase]:
        settings, names = self.phase_settings(), [self.setting.concepts[c].name for c in task.class_ids]
        if not self.learning_changes_past_classes:
            return [Phase(f"{PHASE}{n}", (c,), settings, True) for n, c in zip(names, task.class_ids, strict=True)]
        return [Phase(f"task_{task.index + 1}", task.class_ids, scaled(settings, len(names)), independent=False)]

    def phase_settings(self) -> PhaseSettings:
        """Return the settings of one concept's phase; its learning rate is that of the adapted layers, or else of tokens."""
        training = self.setting.training
        rate = training.concept_learning_rate or (self._rate(self.rates) if self.rates else self._token_rate())
        return replace(PhaseSettings.of(training, "concept"), learning_rate=rate)

    def _rate(self, rates: Rates) -> float:
        return rates.tiny if self.setting.is_tiny else rates.other

    def _token_rate(self) -> float:
        return self.setting.training.token_learning_rate or self._rate(self.token_rates)

    def trainable(self, phase: Phase, adapted: Mapping[str, nn.Parameter]) -> Trainable:
        """Return what a phase trains: parameters of the denoiser, and the rows of its concepts' tokens, from their start."""
        tokens = [self.setting.concepts[class_id].token for class_id in phase.class_ids]
        with torch.no_grad():
            for name, row in self.rows.named_parameters():
                row.copy_(self._starts[name])
        self._loaded.clear()
        self.load_rows([one for one in self.setting.seen(self.task_of(phase)) if one not in phase.class_ids])
        rows: dict[str, nn.Parameter] = {}
        if self.setting.arguments.train_token:
            self.rows.train_only(tokens)
            rows = {f"rows.{t}.{key}": row for t in tokens for key, row in self.rows.parameters_of(t).items()}
        if self.setting.training.gradient_checkpointing:
            self.model.denoiser.enable_gradient_checkpointing()
        factor = self._token_rate() / phase.settings.learning_rate
        self.model.train()
        return Trainable(self.model, {**adapted, **rows}, factors=dict.fromkeys(rows, factor))

    def replayed(self, phase: Phase) -> Mapping[int, Mapping[Path, str]]:
        """Return drawn pictures of earlier concepts for the batches of a phase: id -> pictures -> their captions."""
        return {}

    def training_step(self, phase: Phase, batch: ConceptBatch, module: nn.Module) -> torch.Tensor:
        objective = self.setting.objective
        noisy = objective.noisy(batch.latents, batch.noise, batch.times)
        prediction = module(noisy, batch.times, batch.captions)
        losses = objective.losses(prediction, batch.latents, batch.noise, batch.times)
        # Squares of small numbers would be 0 in half precision.
        with torch.autocast(self.setting.device.type, enabled=False):
            penalty = self.penalty()
        # The trainer divides the sum over all processes by the batch size.
        return losses * batch.weights + penalty * phase.settings.batch_size / batch.total

    def add_adapter(self, config: PeftConfig, name: str) -> dict[str, nn.Parameter]:
        """Put a new adapter into the denoiser, in float32 whatever the base's precision, and return its parameters."""
        denoiser = self.model.denoiser
        denoiser.add_adapter(config, adapter_name=name)
        cast_training_params(denoiser, dtype=torch.float32)
        return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        self.rows.train_only([])
        if self.setting.training.gradient_checkpointing:
            self.model.denoiser.disable_gradient_checkpointing()
        self.model.eval()

    @abstractmethod
    def sampling(self, *class_ids: int) -> AbstractContextManager[DiffusionPipeline]:
        """Return a context that gives the stock pipeline with the weights for prompts of these concepts, or of none."""

    @abstractmethod
    def numbers_per_concept(self) -> int:
        """Count the numbers that are trained for a concept, its token's rows among them."""

    def details(self) -> dict[str, Any]:
        """Return what else results.json should say of a finished run."""
        return {}

    def row_numbers(self) -> int:
        """Count the numbers of a token's rows."""
        row = self.rows.parameters_of(self.rows.tokens[0])
        return sum(one.numel() for one in row.values()) if self.setting.arguments.train_token else 0

    def folder(self, class_id: int) -> Path:
        """Return the folder of a concept."""
        return self.concepts_dir / self.setting.concepts[class_id].name

    def is_kept(self, class_id: int) -> bool:
        """Return whether the folder of a concept is complete."""
        return (self.folder(class_id) / CONCEPT_FILE).is_file()

    @contextmanager
    def keeping(self, class_id: int) -> Iterator[Path]:
        """Write the folder of a concept, whole or not at all: its rows, `concept.json` and card; the caller adds what else it has."""
        concept = self.setting.concepts[class_id]
        with whole_folder(self.folder(class_id)) as temporary:
            yield temporary
            self.rows.save(concept.token, temporary)
            how: dict[str, Any] = {name: getattr(self, name) for name in ("in_model", "layerwise", "mixture_power")}
            how |= {name: getattr(self.model, name) for name in ("family", "resolution")}
            write_concept(temporary, concept, self.setting.arguments, strategy=self.name, **how)

    def load_rows(self, class_ids: Sequence[int]) -> None:
        """Load the rows of those concepts that are learned, once."""
        for class_id in class_ids:
            token = self.setting.concepts[class_id].token
            if token not in self._loaded and self.is_kept(class_id):
                self.rows.load(token, self.folder(class_id))
                self._loaded.add(token)

    def bytes_of(self, class_ids: Sequence[int]) -> int:
        """Return the bytes of the weight files of concepts."""
        files = (path for class_id in class_ids for path in self.folder(class_id).glob("*.safetensors"))
        return sum(path.stat().st_size for path in files)


def scaled(settings: PhaseSettings, concepts: int) -> PhaseSettings:
    """Return settings in which each of several concepts is seen as often as alone; epochs do so by themselves."""
    steps = settings.train_steps
    return replace(settings, train_steps=None if steps is None else steps * concepts)
