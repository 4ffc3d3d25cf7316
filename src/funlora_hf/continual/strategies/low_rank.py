"""Strategies with a LoRA for each task, joined by a rule, for a class-conditional U-Net.

Source: arXiv 2410.04891: strategies [text], details [code] where a docstring says so; for `inc_lora`, `o_lora` and `clora`, see
`penalty_rules`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ...utils.field_types import Range, one_of
from ..base import arrange, base_shape
from ..learning import LearningStrategy
from ..strategy import Phase, Setting, Trainable
from .merging_rules import (
    Kept,
    MagMaxRule,
    MagMaxRuleOptions,
    MergeInitRule,
    MergeOrthogonalRule,
    MergeOrthogonalRuleOptions,
    MergingRule,
    NaiveLoraRule,
    Pairs,
    RuleOptions,
)
from .peft_methods import chosen_targets
from .penalty_rules import CLoraRule, CLoraRuleOptions, IncLoraRule, OLoraRule, OLoraRuleOptions, product_norm
from .sequential import CLASS_VECTORS, Sequential
from .weight_changes import Pair


TARGETS = ("attention", "convolutions", "both")
DEFAULT_RANK = 8
_ADAPTER = "default"
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

logger = logging.getLogger(__name__)


@dataclass
class LowRankOptions(RuleOptions):
    """
    Args:
        targets: "attention", as in the paper; "convolutions", the layers that `target_modules` selects for FunLoRA; or "both".
    """

    targets: Annotated[str, one_of(*TARGETS)] = "attention"


@dataclass
class MergeOrthogonalOptions(MergeOrthogonalRuleOptions, LowRankOptions):
    """The options of the rule, and the targets."""


@dataclass
class MagMaxOptions(MagMaxRuleOptions, LowRankOptions):
    """The options of the rule, and the targets."""


@dataclass
class OLoraOptions(OLoraRuleOptions, LowRankOptions):
    """The options of the rule, and the targets."""


@dataclass
class CLoraOptions(CLoraRuleOptions, LowRankOptions):
    """The options of the rule, with a lambda for digits [ours, a first guess], and the targets."""

    penalty: Annotated[float, Range(0, 1e12)] = 1.0


class Penalized(LearningStrategy):
    """Adds what its rule asks of the pairs in training to the loss; for strategies of classes and of concepts."""

    rule: MergingRule
    penalized: tuple[Kept, Pairs] = ({}, {})
    """The state before the task and the matrices in training; set when a phase begins."""

    def penalty(self) -> torch.Tensor | float:
        kept, pairs = self.penalized
        return self.rule.penalty(kept, matrices(pairs))

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        super().release_phase(phase, trainable)
        self.penalized = {}, {}


class LowRank(Penalized, Sequential):
    """Trains a LoRA of PEFT and the vectors of the task's classes; the weights of the base stay.

    `lora_alpha` is the rank; A starts from N(0, 1/r^2) and B at 0 [code].
    """

    options_class = LowRankOptions
    rule_class: ClassVar[type[MergingRule]]

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.rank = DEFAULT_RANK if setting.model.rank is None else setting.model.rank
        self.takes = ("rank",) if self.options.targets == "attention" else ("rank", "target_modules")
        self.rule = self.rule_class(self.rank, self.options)
        self.grows_with_tasks = self.rule.grows

    def check(self) -> None:
        super().check()
        shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in self._weights().items()}
        self.rule.check(shapes, len(self.setting.tasks) - 1)

    def target_modules(self, unet: UNet2DModel) -> list[str]:
        """Return the names of the layers that get a LoRA, in the U-Net's order.

        Raises:
            ValueError: there are none.
        """
        targets = self.options.targets
        names: set[str] = set()
        if targets in ("attention", "both"):
            attentions = [name for name, module in unet.named_modules() if isinstance(module, Attention)]
            names |= {f"{name}.{projection}" for name in attentions for projection in _PROJECTIONS}
        if targets in ("convolutions", "both"):
            names |= set(_matching(unet, chosen_targets(unet, self.setting.model, "decoder-middle")))
        if not names:
            raise ValueError(
                f"`targets` is {targets!r} and `target_modules` {self.setting.model.target_modules!r}, which name no layer of the "
                f"U-Net: choose other targets ({', '.join(map(repr, TARGETS))}), or name layers that it has."
            )
        return [name for name, _ in unet.named_modules() if name in names]

    def trainable(self, unet: UNet2DModel, kept: Kept) -> Trainable:
        add_deltas(unet, self.rule.training_deltas(kept))
        targets = self.target_modules(unet)
        arrange(unet, self.setting.training, compiled=self.setting.training.torch_compile)
        unet.requires_grad_(False)
        model = get_peft_model(unet, gaussian_lora(self.rank, targets), adapter_name=_ADAPTER)
        if kept:
            set_pairs(model, self.rule.start(get_pairs(model), kept))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        vectors = parameters[CLASS_VECTORS] = unet.get_parameter(CLASS_VECTORS)
        vectors.requires_grad_()
        self.penalized = kept, pair_parameters(model)
        return Trainable(model, parameters)

    def learned(self, trainable: Trainable, kept: Kept) -> dict[str, torch.Tensor]:
        return self.rule.merge(kept, get_pairs(trainable.module))

    def load(self, unet: UNet2DModel, kept: Kept) -> None:
        add_deltas(unet, self.rule.deltas(kept))

    def trained_bytes(self, base: int) -> int:
        return 4 * self.rank * sum(sum(weight.shape) for weight in self._weights().values())

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the weights `(out, in)` of the layers that get a LoRA, without values."""
        shape = base_shape(self.setting)
        return {name: shape.get_parameter(f"{name}.weight").flatten(1) for name in self.target_modules(shape)}


class NaiveLora(LowRank):
    """One pair of matrices for each layer, which every task trains further."""

    name, rule_class = NaiveLoraRule.name, NaiveLoraRule


class MergeInit(LowRank):
    """Adds every task's product to the weights; the next task starts a new pair."""

    name, rule_class = MergeInitRule.name, MergeInitRule


class MergeOrthogonal(LowRank):
    """Like merge_init, but new pairs start orthogonal to what was learned, and there are four forms of the sum."""

    name, rule_class = MergeOrthogonalRule.name, MergeOrthogonalRule
    options_class = MergeOrthogonalOptions


class MagMax(LowRank):
    """Keeps the larger of the old and the new change of each weight, by magnitude."""

    name, rule_class = MagMaxRule.name, MagMaxRule
    options_class = MagMaxOptions


class IncLora(LowRank):
    """Trains a new pair for each task; the earlier ones stay, frozen and active."""

    name, rule_class = IncLoraRule.name, IncLoraRule


class OLora(LowRank):
    """Like inc_lora, with a penalty that keeps a task's pairs orthogonal to those of earlier tasks."""

    name, rule_class = OLoraRule.name, OLoraRule
    options_class = OLoraOptions


class CLora(LowRank):
    """Like merge_init, with a penalty that keeps a task from the entries that earlier ones have changed."""

    name, rule_class = CLoraRule.name, CLoraRule
    options_class = CLoraOptions

    def learned(self, trainable: Trainable, kept: Kept) -> dict[str, torch.Tensor]:
        logger.info("norm of the task's product, all layers together: %.3g", product_norm(get_pairs(trainable.module)))
        return super().learned(trainable, kept)


def gaussian_lora(rank: int, target_modules: list[str]) -> LoraConfig:
    """Return the configuration of a LoRA whose scale is 1, with A from N(0, 1/r^2) and B at 0."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules, init_lora_weights="gaussian")


def _matching(unet: UNet2DModel, targets: list[str] | str | None) -> list[str]:
    """Return the names of the convolutions and linear layers that PEFT finds by these targets: names, their ends, or one regex."""
    config = LoraConfig(target_modules=targets)
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return [name for name in layers if check_target_module_exists(config, name)]


def add_deltas(model: nn.Module, deltas: Mapping[str, torch.Tensor]) -> None:
    """Add changes `(out, in)` to the weights of layers, in place."""
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = model.get_parameter(f"{name}.weight")
            weight.add_(delta.to(weight).view_as(weight))


def get_pairs(model: nn.Module) -> Pairs:
    """Return copies of a LoRA's matrices by layer; those of a convolution are flattened."""
    pairs = matrices(pair_parameters(model))
    return {name: Pair(*(own.detach().clone() for own in pair)) for name, pair in pairs.items()}


def matrices(pairs: Mapping[str, Pair]) -> Pairs:
    """Return views of a LoRA's pairs in which those of a convolution are flattened."""
    return {name: Pair(*(own.flatten(1) for own in pair)) for name, pair in pairs.items()}


def set_pairs(model: nn.Module, pairs: Mapping[str, Pair]) -> None:
    """Set the matrices that `get_pairs` returns, in place."""
    with torch.no_grad():
        for name, pair in pair_parameters(model).items():
            for own, given in zip(pair, pairs[name], strict=True):
                own.copy_(given.view_as(own))


def pair_parameters(model: nn.Module, adapter: str = _ADAPTER) -> Pairs:
    """Return the matrices themselves, of a `PeftModel` or of a model into which diffusers has put a LoRA."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    return {
        name: Pair(*(part[adapter].get_parameter("weight") for part in (layer.lora_A, layer.lora_B)))
        for name, layer in layers.items()
    }
