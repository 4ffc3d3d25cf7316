"""The four strategies of "Low-Rank Continual Personalization": one LoRA after another for all classes, joined in four ways.

Source: arXiv 2410.04891: strategies [text], details [code] where a docstring says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ...layer_selection import resolve_targets
from ...utils.checks import check_choice
from ..base import arrange, unet_shape
from ..strategy import Setting, Trainable
from .sequential import CLASS_VECTORS, Sequential
from .weight_changes import (
    Pair,
    concatenated,
    larger_magnitude,
    nullspace_start,
    product,
    rank_space_start,
    row_space,
    summed_factors,
    truncated,
)


TARGETS = ("attention", "convolutions", "both")
ORTHOGONAL = ("nullspace", "released")
MERGES = ("concat", "factor_sum", "svd", "dense")
COMPARED = ("running", "cumulative")
DEFAULT_RANK = 8
_ADAPTER = "default"
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

Kept = Mapping[str, torch.Tensor]
Deltas = dict[str, torch.Tensor]
Pairs = dict[str, Pair]


@dataclass
class LowRankOptions:
    """
    Args:
        targets: "attention", as in the paper; "convolutions", those that `target_modules` names for FunLoRA; or "both".
    """

    targets: str = "attention"

    def __post_init__(self) -> None:
        check_choice("targets", self.targets, TARGETS)


@dataclass
class MergeOrthogonalOptions(LowRankOptions):
    """
    Args:
        targets: as in the other strategies.
        orthogonal: where a task's A starts: "nullspace", orthogonal to the row space of what was learned [ours], or "released",
            column by column orthogonal in rank space [code].
        merge: "concat", a pair of higher rank for every task; "factor_sum", sums of factors [code]; "svd", the nearest pair of
            the same rank; "dense", the sum of the products.
    """

    orthogonal: str = "nullspace"
    merge: str = "concat"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("orthogonal", self.orthogonal, ORTHOGONAL)
        check_choice("merge", self.merge, MERGES)
        if self.orthogonal == "released" and self.merge in ("concat", "dense"):
            raise ValueError(
                f"`orthogonal` is 'released', which needs an accumulated A of the rank of a task's, and `merge` {self.merge!r} "
                "keeps none: take merge=factor_sum, as released, or merge=svd."
            )


@dataclass
class MagMaxOptions(LowRankOptions):
    """
    Args:
        targets: as in the other strategies.
        compared: "running": a task's own change with what was kept, entry by entry, and training goes on from the result
            [code]. "cumulative": the changes since the base behind every task, as in the original; training goes on from the
            weights as trained.
        scaling: the original's lambda, by which "cumulative" multiplies the change at the end.
    """

    compared: str = "running"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compared", self.compared, COMPARED)
        if not 0 < self.scaling <= 10:
            raise ValueError(f"`scaling` is {self.scaling}, expected a number above 0, at most 10.")
        if self.scaling != 1 and self.compared == "running":
            raise ValueError(
                f"`scaling` is {self.scaling}, which only compared='cumulative' has a use for: leave it out, or take that."
            )


class LowRank(Sequential):
    """Trains a LoRA of PEFT and the vectors of the task's classes, on a base that keeps its weights.

    `lora_alpha` is the rank; A starts from N(0, 1/r^2) and B at 0 [code].
    """

    options_class = LowRankOptions

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.rank = DEFAULT_RANK if setting.model.rank is None else setting.model.rank

    def check(self) -> None:
        super().check()
        self.target_modules(self._shape())

    def target_modules(self, unet: UNet2DModel) -> list[str]:
        """Names of the layers that get a LoRA, in the U-Net's order.

        Raises:
            ValueError: there are none.
        """
        targets = self.options.targets
        names: set[str] = set()
        if targets in ("attention", "both"):
            attentions = [name for name, module in unet.named_modules() if isinstance(module, Attention)]
            names |= {f"{name}.{projection}" for name in attentions for projection in _PROJECTIONS}
        if targets in ("convolutions", "both"):
            chosen = self.setting.model.target_modules
            names |= set(_matching(unet, resolve_targets(unet, "decoder-middle" if chosen is None else chosen)))
        if not names:
            raise ValueError(
                f"`targets` is {targets!r} and `target_modules` {self.setting.model.target_modules!r}, which name no layer of the "
                f"U-Net: choose other targets ({', '.join(map(repr, TARGETS))}), or name layers that it has."
            )
        return [name for name, _ in unet.named_modules() if name in names]

    @abstractmethod
    def deltas(self, kept: Kept) -> Deltas:
        """Changes of the base's weights that the generator has behind a task, `(out, in)` by layer."""

    def training_deltas(self, kept: Kept) -> Deltas:
        """Those that the next task is trained on top of."""
        return self.deltas(kept)

    def start(self, gaussian: Pairs, kept: Kept) -> Pairs:
        """Where a task's pairs start.

        Args:
            gaussian: the usual start.
            kept: what the task before has left; not empty.
        """
        return gaussian

    @abstractmethod
    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        """What is left of a task, from what the task before has left, empty behind the base, and this task's pairs."""

    def trainable(self, unet: UNet2DModel, kept: Kept) -> Trainable:
        add_deltas(unet, self.training_deltas(kept) if kept else {})
        targets = self.target_modules(unet)
        arrange(unet, self.setting.training, compiled=self.setting.training.torch_compile)
        unet.requires_grad_(False)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets, init_lora_weights="gaussian")
        model = get_peft_model(unet, config, adapter_name=_ADAPTER)
        if kept:
            set_pairs(model, self.start(get_pairs(model), kept))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parameters[CLASS_VECTORS] = unet.class_embedding.weight.requires_grad_()
        return Trainable(model, parameters)

    def learned(self, trainable: Trainable, kept: Kept) -> dict[str, torch.Tensor]:
        return self.merge(kept, get_pairs(trainable.module))

    def load(self, unet: UNet2DModel, kept: Kept) -> None:
        add_deltas(unet, self.deltas(kept) if kept else {})

    def trained_bytes(self, base: int) -> int:
        shape = self._shape()
        layers = dict(shape.named_modules())
        weights = [layers[name].weight for name in self.target_modules(shape)]
        return 4 * self.rank * sum(len(weight) + weight[0].numel() for weight in weights)

    def _shape(self) -> UNet2DModel:
        setting = self.setting
        if not setting.has_base:
            return unet_shape(setting.model.unet_config, len(setting.tasks[0].class_ids))
        config = UNet2DModel.load_config(setting.base_dir, subfolder="unet")
        with torch.device("meta"):
            return UNet2DModel.from_config(config)


class NaiveLora(LowRank):
    """One pair of matrices, trained on from task to task."""

    name = "naive_lora"

    def deltas(self, kept: Kept) -> Deltas:
        return {layer: product(pair) for layer, pair in unpack(kept).items()}

    def training_deltas(self, kept: Kept) -> Deltas:
        return {}

    def start(self, gaussian: Pairs, kept: Kept) -> Pairs:
        return unpack(kept)

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        return pack(learned)


class MergeInit(LowRank):
    """Every task's product is added to the weights, and the next task starts a fresh pair."""

    name = "merge_init"

    def deltas(self, kept: Kept) -> Deltas:
        return only(kept, "delta")

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        past = only(kept, "delta")
        return {f"{layer}/delta": past.get(layer, 0) + product(pair) for layer, pair in learned.items()}


class MergeOrthogonal(LowRank):
    """As merge_init, but the fresh pair starts orthogonal to what was learned, and the sum can be kept in four forms."""

    name = "merge_orthogonal"
    options_class = MergeOrthogonalOptions

    @property
    def grows_with_tasks(self) -> bool:
        """The concatenation does, by a pair for every task."""
        return self.options.merge == "concat"

    def check(self) -> None:
        super().check()
        if self.options.orthogonal == "nullspace":
            self._check_dimensions()
        elif self.rank == 1:
            raise ValueError(
                "`rank` is 1, for which orthogonal='released' starts A at zero, so that nothing is learned: take 2 or more, or "
                "orthogonal=nullspace."
            )

    def deltas(self, kept: Kept) -> Deltas:
        if self.options.merge == "dense":
            return only(kept, "delta")
        return {layer: product(pair) for layer, pair in unpack(kept).items()}

    def start(self, gaussian: Pairs, kept: Kept) -> Pairs:
        if self.options.orthogonal == "released":
            past = unpack(kept)
            return {layer: Pair(rank_space_start(A, past[layer].A), B) for layer, (A, B) in gaussian.items()}
        past = self.deltas(kept)
        return {layer: Pair(nullspace_start(A, row_space(past[layer])), B) for layer, (A, B) in gaussian.items()}

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        if self.options.merge == "dense":
            past = only(kept, "delta")
            return {f"{layer}/delta": past.get(layer, 0) + product(pair) for layer, pair in learned.items()}
        past = unpack(kept)
        return pack({layer: self._joined(past[layer], pair) if past else pair for layer, pair in learned.items()})

    def _joined(self, old: Pair, new: Pair) -> Pair:
        if self.options.merge == "concat":
            return concatenated(old, new)
        if self.options.merge == "factor_sum":
            return summed_factors(old, new)
        return truncated(product(old) + product(new), self.rank)

    def _check_dimensions(self) -> None:
        """Whether the nullspace can last to the end, before anything is trained."""
        shape = self._shape()
        layers = dict(shape.named_modules())
        tasks = len(self.setting.tasks) - 1
        for name in self.target_modules(shape):
            outputs, inputs = len(layers[name].weight), layers[name].weight[0].numel()
            if self.options.merge in ("concat", "dense"):
                taken = min(self.rank * (tasks - 1), outputs)
            else:
                taken = min(self.rank, outputs) if tasks > 1 else 0
            if taken + self.rank > inputs:
                keeps_rank = self.options.merge in ("svd", "factor_sum")
                other = "" if keeps_rank else ", or take merge=svd, which keeps the rank of what was learned"
                raise ValueError(
                    f"`orthogonal` is 'nullspace', but before the last of {tasks} tasks with `rank` {self.rank} the layer {name} "
                    f"would have {taken} of its {inputs} inputs taken, and {self.rank} more are needed: lower the rank{other}."
                )


class MagMax(LowRank):
    """Of the old and the new change of each weight, the one of larger magnitude stays."""

    name = "magmax"
    options_class = MagMaxOptions

    def deltas(self, kept: Kept) -> Deltas:
        scaling = self.options.scaling
        return {layer: scaling * delta for layer, delta in only(kept, "delta").items()}

    def training_deltas(self, kept: Kept) -> Deltas:
        return only(kept, "trained" if self.options.compared == "cumulative" else "delta")

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        past, trained = only(kept, "delta"), only(kept, "trained")
        merged = {}
        for layer, pair in learned.items():
            delta = product(pair)
            if self.options.compared == "cumulative":
                delta = trained.get(layer, 0) + delta
                merged[f"{layer}/trained"] = delta
            merged[f"{layer}/delta"] = larger_magnitude(past[layer], delta) if past else delta
        return merged


def _matching(unet: UNet2DModel, targets: Sequence[str] | str) -> list[str]:
    """Names of the convolutions and linear layers that PEFT would find by these targets: names, their ends, or one regex."""
    if not isinstance(targets, str) and len(targets) == 1:
        (targets,) = targets  # a regex, or a name, which is one for itself
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return [name for name in layers if check_target_module_exists(config, name)]


def add_deltas(unet: UNet2DModel, deltas: Mapping[str, torch.Tensor]) -> None:
    """Add changes `(out, in)` to the weights of layers, in place."""
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = unet.get_submodule(name).weight
            weight += delta.to(weight).view_as(weight)


def get_pairs(model: PeftModel) -> Pairs:
    """Copies of a LoRA's matrices by layer; those of a convolution are flattened."""
    return {
        name: Pair(A.weight.detach().flatten(1).clone(), B.weight.detach().flatten(1).clone())
        for name, A, B in _lora_layers(model)
    }


def set_pairs(model: PeftModel, pairs: Mapping[str, Pair]) -> None:
    """The inverse of `get_pairs`, in place."""
    with torch.no_grad():
        for name, A, B in _lora_layers(model):
            A.weight.copy_(pairs[name].A.view_as(A.weight))
            B.weight.copy_(pairs[name].B.view_as(B.weight))


def _lora_layers(model: PeftModel) -> list[tuple[str, nn.Module, nn.Module]]:
    modules = model.get_base_model().named_modules()
    return [(name, m.lora_A[_ADAPTER], m.lora_B[_ADAPTER]) for name, m in modules if isinstance(m, LoraLayer)]


def only(kept: Kept, what: str) -> dict[str, torch.Tensor]:
    """Tensors by layer, of those that `layer/what` names."""
    return {name.rpartition("/")[0]: tensor for name, tensor in kept.items() if name.endswith(f"/{what}")}


def pack(pairs: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    """Pairs by layer as named tensors."""
    return {f"{layer}/{what}": matrix for layer, pair in pairs.items() for what, matrix in pair._asdict().items()}


def unpack(kept: Kept) -> Pairs:
    """The inverse of `pack`; other tensors are left out."""
    B = only(kept, "B")
    return {layer: Pair(A, B[layer]) for layer, A in only(kept, "A").items()}
