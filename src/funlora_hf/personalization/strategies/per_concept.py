"""Strategies that train something of its own for each concept, on the untouched base: nothing is forgotten, by construction.

Sources: textual inversion, arXiv 2208.01618; DreamBooth with LoRA as in diffusers' scripts [code]; FunLoRA's weights are those of
arXiv 2510.02631 [exact], their use for concepts is [ours].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig

from ...adapters.base_fingerprint import base_fingerprints
from ...adapters.class_folder import save_adapter
from ...adapters.put_into_model import load_adapter
from ...continual.learning import Phase, Trainable
from ...continual.strategies.low_rank import gaussian_lora
from ...tuner import FunLoraConfig
from ...tuner_base.wrappers import remove_adapters
from ..load_concept import activate
from .base import ConceptSetting, ConceptStrategy, Rates


# In training, so that the next concept runs the same code; in the folder and in sampling an adapter has the concept's name.
LIVE = "live"


class PerConcept(ConceptStrategy):
    """A token's row and, in most, an adapter for each concept."""

    grows_with_tasks = True
    learning_changes_past_classes = False

    def __init__(self, setting: ConceptSetting) -> None:
        super().__init__(setting)
        self._adapters: set[str] = set()
        self._pipe: DiffusionPipeline | None = None
        self._fingerprint: dict[str, str] | None = None

    def adapter_config(self) -> PeftConfig | None:
        """Return the configuration of a concept's adapter; None: there is none."""
        return None

    def is_finished(self, phase: Phase) -> bool:
        return self.is_kept(phase.class_ids[0])

    def build(self, phase: Phase) -> Trainable:
        self._remove(list(self._adapters))
        config = self.adapter_config()
        return self.trainable(phase, {} if config is None else self.add_adapter(config, LIVE))

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        (class_id,) = phase.class_ids
        concept = self.setting.concepts[class_id]
        with self.keeping(class_id) as folder:
            if self.adapter_config() is not None:
                denoiser = self.model.denoiser
                config = denoiser.peft_config[LIVE]
                config.base_model_name_or_path = self.setting.arguments.pretrained_model_name_or_path
                config.revision = self.setting.arguments.revision
                if isinstance(config, FunLoraConfig):
                    config.base_fingerprint = self._base_fingerprint()
                save_adapter(denoiser, folder, LIVE, class_name=concept.name)

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        self._remove([LIVE])
        super().release_phase(phase, trainable)

    @contextmanager
    def sampling(self, *class_ids: int) -> Iterator[DiffusionPipeline]:
        denoiser, names = self.model.denoiser, [self.setting.concepts[class_id].name for class_id in class_ids]
        self.load_rows(class_ids)
        if self.adapter_config() is not None:
            for class_id, name in zip(class_ids, names, strict=True):
                if name not in self._adapters:
                    load_adapter(denoiser, self.folder(class_id), adapter_name=name)
                    self._adapters.add(name)
        if self._adapters:
            activate(denoiser, names)
        self._pipe = self._pipe or self.model.pipeline()
        yield self._pipe

    def numbers_per_concept(self) -> int:
        return self._adapter_numbers + self.row_numbers()

    @cached_property
    def _adapter_numbers(self) -> int:
        """The numbers of an adapter, the same for all concepts; counted once, since the denoiser loses its adapters for it."""
        config = self.adapter_config()
        if config is None:
            return 0
        self._remove(list(self._adapters))
        numbers = sum(one.numel() for one in self.add_adapter(config, LIVE).values())
        self._remove([LIVE])
        return numbers

    def memory_report(self) -> dict[str, int]:
        kept = self.bytes_of([class_id for class_id in self.setting.concepts if self.is_kept(class_id)])
        # Adam's two moments, the moving average and the gradient, in float32.
        return {"persistent": kept, "per_class": kept, "transient": 4 * 4 * self.numbers_per_concept()}

    def _remove(self, names: list[str]) -> None:
        remove_adapters(self.model.denoiser, names)
        self._adapters -= set(names)

    def _base_fingerprint(self) -> dict[str, str]:
        if self._fingerprint is None:
            self._fingerprint = base_fingerprints(self.model.denoiser)
        return self._fingerprint


class TextualInversion(PerConcept):
    """Trains the row of the token only."""

    name = "textual_inversion"
    takes = ()
    rates = None
    token_rates = Rates(6e-2, 5e-4)


class Lora(PerConcept):
    """A LoRA for each concept. `lora_alpha` is the rank; A starts from N(0, 1/r^2) and B at 0, as in diffusers' scripts."""

    name = "lora"
    rates = Rates(8e-3, 1e-4)

    def adapter_config(self) -> LoraConfig:
        return gaussian_lora(self.rank, self.target_modules())


class FunLora(PerConcept):
    """A FunLoRA adapter for each concept, by default on cross-attention."""

    name = "funlora"
    takes = ("target_modules", "rank", "function", "num_functions", "ratio")
    rates = Rates(5e-2, 1e-3)

    @property
    def rank(self) -> int:
        return self.setting.arguments.rank or 1

    def adapter_config(self) -> FunLoraConfig:
        given = self.setting.arguments
        return FunLoraConfig(
            r=self.rank,
            function=given.function,
            num_functions=given.num_functions,
            ratio=given.ratio,
            target_modules=self.target_modules(),
        )
