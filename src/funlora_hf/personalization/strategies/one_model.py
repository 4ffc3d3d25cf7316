"""Strategies with one model for all concepts, whose weights change with every task; only the newest changes are kept.

The denoiser's own weights are put back before each change, so no error of rounding adds up.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...continual.learning import Phase, Trainable
from ...continual.strategies.low_rank import Penalized, gaussian_lora, get_pairs, pair_parameters, set_pairs
from ...continual.strategies.merging_rules import (
    Kept,
    MagMaxRule,
    MagMaxRuleOptions,
    MergeInitRule,
    MergeOrthogonalRule,
    MergeOrthogonalRuleOptions,
    MergingRule,
    NaiveLoraRule,
    RuleOptions,
    only,
)
from ...continual.strategies.penalty_rules import IncLoraRule, OLoraRule, OLoraRuleOptions
from ...continual.strategies.sequential import KeptFile
from ...data.tasks import Task
from ...text_to_image.token_rows import with_vectors
from ...tuner_base.wrappers import remove_adapters
from .base import ConceptSetting, ConceptStrategy, Rates, scaled


_ADAPTER = "default"


class OneModel(ConceptStrategy):
    """The base plus changes of some layers, which every task continues."""

    in_model = True

    def __init__(self, setting: ConceptSetting) -> None:
        super().__init__(setting)
        self.kept = KeptFile(setting.output_dir / "checkpoints" / "model_changes")
        self.model_dir = setting.output_dir / "model"
        self._originals = {name: self.weight(name).detach().cpu().clone() for name in self.target_modules()}
        self._pipe: DiffusionPipeline | None = None

    @abstractmethod
    def adapted(self, kept: Kept) -> dict[str, nn.Parameter]:
        """Build the parameters that a task trains, on the model with `training_deltas`; `kept`: of the task before."""

    @abstractmethod
    def learned(self, kept: Kept) -> dict[str, torch.Tensor]:
        """Return what to keep of the task that the denoiser has just been trained on."""

    def deltas(self, kept: Kept) -> Mapping[str, torch.Tensor]:
        """Return the changes of the base's weights, `(out, in)` by layer, with which concepts are sampled."""
        return only(kept, "delta")

    def training_deltas(self, kept: Kept) -> Mapping[str, torch.Tensor]:
        """Return those with which the next task is trained."""
        return self.deltas(kept)

    def deltas_of(self, class_ids: Sequence[int], kept: Kept) -> Mapping[str, torch.Tensor]:
        """Return those with which prompts of some concepts, or of none, are sampled; the same for all, if there is one model."""
        return self.deltas(kept)

    def is_finished(self, phase: Phase) -> bool:
        return self.kept.newest(self.setting.tasks[self.task_of(phase).index :]) is not None

    def build(self, phase: Phase) -> Trainable:
        kept = self.kept_before(phase)
        self.put(self.training_deltas(kept))
        return self.trainable(phase, self.adapted(kept))

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        kept = self.learned(self.kept_before(phase))
        for class_id in phase.class_ids:
            with self.keeping(class_id):
                pass
        if phase.class_ids[-1] == self.setting.tasks[-1].class_ids[-1]:
            self.take_out()
            self.put(self.deltas(kept))
            self.model.pipeline().save_pretrained(self.model_dir)
        # Last, since it says that the phase is finished.
        self.kept.save(self.task_of(phase), kept)

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        self.take_out()
        self.put({})
        super().release_phase(phase, trainable)

    @abstractmethod
    def take_out(self) -> None:
        """Take out of the denoiser what `adapted` has put in; done twice, nothing more."""

    def end_task(self, task: Task) -> None:
        self.kept.drop_before(task, self.setting.tasks)

    @contextmanager
    def sampling(self, *class_ids: int) -> Iterator[DiffusionPipeline]:
        self.load_rows(list(self.setting.concepts))
        self.put(self.deltas_of(class_ids, self.load(self.setting.tasks)))
        self._pipe = self._pipe or self.model.pipeline()
        try:
            yield self._pipe
        finally:
            self.put({})

    def weight(self, name: str) -> nn.Parameter:
        """Return the weight of a layer."""
        return self.model.denoiser.get_parameter(f"{name}.weight")

    @torch.no_grad()
    def put(self, deltas: Mapping[str, torch.Tensor]) -> None:
        """Set the weights of the layers to the base's plus these changes."""
        for name, original in self._originals.items():
            weight = self.weight(name)
            if name in deltas:
                # In float32, rounded once.
                weight.copy_(original.to(weight.device).float() + deltas[name].to(weight.device).view_as(weight))
            else:
                weight.copy_(original)

    def numbers_per_concept(self) -> int:
        return self.trained_numbers() + self.row_numbers()

    @abstractmethod
    def trained_numbers(self) -> int:
        """Count the numbers of the denoiser that a task trains."""

    def check_reads_text(self) -> None:
        """Raise a ValueError unless all layers have the text's states as inputs."""
        others = [name for name in self._originals if name not in self.model.layers("kv")]
        if others or not self.model.traits.kv_reads_states:
            raise ValueError(
                f"`strategy` {self.name!r} {self.options} needs layers that read the states of the text themselves, `target_modules` "
                f"'kv' of Stable Diffusion and SDXL, but {next(iter(others or self._originals))} does not: choose other layers or another "
                "strategy."
            )

    @torch.no_grad()
    def states(self, text: str) -> torch.Tensor:
        """Return the states of a text without its start and what comes after its end, `(n, width)`, float64."""
        tokenizer = next(iter(self.model.tokenizers.values()))
        end = len(tokenizer(with_vectors([text], tokenizer)[0], truncation=True).input_ids)
        return self.model.encode([text])["prompt_embeds"][0, 1:end].double()

    def memory_report(self) -> dict[str, int]:
        rows = self.bytes_of([class_id for class_id in self.setting.concepts if self.is_kept(class_id)])
        # Without what `learned` notes of each task for `details`.
        changes = sum(tensor.nbytes for name, tensor in self.load(self.setting.tasks).items() if "/" in name)
        return {"persistent": changes + rows, "per_class": rows, "transient": 4 * 4 * self.numbers_per_concept()}

    def kept_before(self, phase: Phase) -> dict[str, torch.Tensor]:
        """Return what is kept of the tasks before a phase."""
        return self.load(self.setting.tasks[: self.task_of(phase).index])

    def load(self, tasks: Sequence[Task]) -> dict[str, torch.Tensor]:
        """Return what is kept of the last of some tasks that is learned."""
        newest = self.kept.newest(tasks)
        return {name: tensor.to(self.setting.device) for name, tensor in self.kept.load(newest).items()}


class FullWeights(OneModel):
    """Trains weights of layers themselves, in float32 whatever the base's precision."""

    takes: ClassVar[tuple[str, ...]] = ("target_modules",)
    rates = Rates(1.5e-3, 1e-5)
    default_layers = "kv"

    def build(self, phase: Phase) -> Trainable:
        self._cast(torch.float32)
        return super().build(phase)

    def adapted(self, kept: Kept) -> dict[str, nn.Parameter]:
        weights = {f"{name}.weight": self.weight(name) for name in self._originals}
        for weight in weights.values():
            weight.requires_grad_()
        return weights

    def take_out(self) -> None:
        self.model.denoiser.requires_grad_(False)
        self._cast(None)

    def changes(self) -> dict[str, torch.Tensor]:
        """Return the changes of the base's weights, float32."""
        device = self.setting.device
        return {
            name: self.weight(name).detach() - original.to(device).float()
            for name, original in self._originals.items()
        }

    def trained_numbers(self) -> int:
        return sum(weight.numel() for weight in self._originals.values())

    def _cast(self, dtype: torch.dtype | None) -> None:
        """Cast the layers; None: to their own precision."""
        for name, original in self._originals.items():
            self.model.denoiser.get_submodule(name).to(dtype or original.dtype)


class LowRank(Penalized, OneModel):
    """A LoRA for each task, joined with those before by a rule. `lora_alpha` is the rank; A starts from N(0, 1/r^2), B at 0 [code]."""

    options_class = RuleOptions
    rule_class: ClassVar[type[MergingRule]]
    rates = Rates(1.5e-3, 1e-5)
    default_layers = "attention"

    def __init__(self, setting: ConceptSetting) -> None:
        super().__init__(setting)
        self.rule = self.rule_class(self.rank, self.options)
        self.grows_with_tasks = self.rule.grows

    def check(self) -> None:
        super().check()
        self.rule.check(self._shapes(), len(self.setting.tasks))

    def deltas(self, kept: Kept) -> Mapping[str, torch.Tensor]:
        return self.rule.deltas(kept)

    def training_deltas(self, kept: Kept) -> Mapping[str, torch.Tensor]:
        return self.rule.training_deltas(kept)

    def adapted(self, kept: Kept) -> dict[str, nn.Parameter]:
        denoiser = self.model.denoiser
        parameters = self.add_adapter(gaussian_lora(self.rank, self.target_modules()), _ADAPTER)
        if kept:
            set_pairs(denoiser, self.rule.start(get_pairs(denoiser), kept))
        self.penalized = kept, pair_parameters(denoiser)
        return parameters

    def learned(self, kept: Kept) -> dict[str, torch.Tensor]:
        return self.rule.merge(kept, get_pairs(self.model.denoiser))

    def take_out(self) -> None:
        remove_adapters(self.model.denoiser, [_ADAPTER])

    def trained_numbers(self) -> int:
        return self.rank * sum(outputs + inputs for outputs, inputs in self._shapes().values())

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (len(weight), weight[0].numel()) for name, weight in self._originals.items()}


class NaiveLora(LowRank):
    """One pair of matrices for each layer, which every task trains further."""

    name, rule_class = NaiveLoraRule.name, NaiveLoraRule


class MergeInit(LowRank):
    """Adds every task's product to the weights; the next task starts a new pair."""

    name, rule_class = MergeInitRule.name, MergeInitRule


class MergeOrthogonal(LowRank):
    """Like merge_init, but new pairs start orthogonal to what was learned, and there are four forms of the sum."""

    name, rule_class = MergeOrthogonalRule.name, MergeOrthogonalRule
    options_class = MergeOrthogonalRuleOptions


class MagMax(LowRank):
    """Keeps the larger of the old and the new change of each weight, by magnitude."""

    name, rule_class = MagMaxRule.name, MagMaxRule
    options_class = MagMaxRuleOptions


class IncLora(LowRank):
    """Trains a new pair for each task; the earlier ones stay, frozen and active."""

    name, rule_class = IncLoraRule.name, IncLoraRule
    rates = Rates(1.5e-3, 5e-6)


class OLora(IncLora):
    """Like inc_lora, with a penalty that keeps a task's pairs orthogonal to those of earlier tasks."""

    name, rule_class = OLoraRule.name, OLoraRule
    options_class = OLoraRuleOptions


class Joint(LowRank):
    """The upper bound: one LoRA and all rows, trained on the images of all concepts at once, with as many steps in all."""

    name, rule_class = "joint", NaiveLoraRule
    requires = frozenset({"all_tasks"})
    learning_changes_past_classes = False
    rates = Rates(8e-3, 1e-4)
    default_layers = "cross"

    def phases(self, task: Task) -> list[Phase]:
        if task.index > 0:
            return []
        class_ids = tuple(self.setting.concepts)
        return [Phase("joint", class_ids, scaled(self.phase_settings(), len(class_ids)), independent=False)]

    def end_task(self, task: Task) -> None:
        """Keep the file of the first task, the only one."""
