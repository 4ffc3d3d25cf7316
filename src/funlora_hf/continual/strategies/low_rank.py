"""The four strategies of "Low-Rank Continual Personalization": a LoRA for each task, and four ways to join them.

Source: arXiv 2410.04891: strategies [text], details [code] where a docstring says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ...utils.field_types import Range, check_field_types, one_of
from ..base import arrange, base_shape
from ..strategy import Setting, Trainable
from .peft_methods import chosen_targets
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
        targets: "attention", as in the paper; "convolutions", the layers that `target_modules` selects for FunLoRA; or "both".
    """

    targets: Annotated[str, one_of(*TARGETS)] = "attention"

    def __post_init__(self) -> None:
        check_field_types(self)


@dataclass
class MergeOrthogonalOptions(LowRankOptions):
    """
    Args:
        targets: as in the other strategies.
        orthogonal: where a task's A starts: "nullspace", orthogonal to the row space of what was learned [ours], or "released",
            column by column orthogonal in rank space [code].
        merge: "concat", a pair whose rank grows with every task; "factor_sum", sums of factors [code]; "svd", the nearest pair of
            the same rank; "dense", the sum of the products.
    """

    orthogonal: Annotated[str, one_of("nullspace", "released")] = "nullspace"
    merge: Annotated[str, one_of("concat", "factor_sum", "svd", "dense")] = "concat"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orthogonal == "released" and self.merge in ("concat", "dense"):
            raise ValueError(
                f"`orthogonal` is 'released', which needs an accumulated A with the rank of a task's A, but `merge` {self.merge!r} "
                "keeps none: take merge=factor_sum, as released, or merge=svd."
            )


@dataclass
class MagMaxOptions(LowRankOptions):
    """
    Args:
        targets: as in the other strategies.
        compared: what is compared, entry by entry. "running": a task's own change with the kept one; training continues from
            the result [code]. "cumulative": the changes since the base after every task, as in the original; training continues
            from the weights as trained.
        scaling: the original's lambda, by which "cumulative" multiplies the change at the end.
    """

    compared: Annotated[str, one_of("running", "cumulative")] = "running"
    scaling: Annotated[float, Range(0, 10, above=True)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling != 1 and self.compared == "running":
            raise ValueError(
                f"`scaling` is {self.scaling}, which only compared='cumulative' uses: leave it out, or set that."
            )


class LowRank(Sequential):
    """Trains a LoRA of PEFT and the vectors of the task's classes; the weights of the base stay.

    `lora_alpha` is the rank; A starts from N(0, 1/r^2) and B at 0 [code].
    """

    options_class = LowRankOptions

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.rank = DEFAULT_RANK if setting.model.rank is None else setting.model.rank
        self.takes = ("rank",) if self.options.targets == "attention" else ("rank", "target_modules")

    def check(self) -> None:
        super().check()
        self._weights()

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

    def deltas(self, kept: Kept) -> Deltas:
        """Return the changes of the base's weights in the generator after a task, `(out, in)` by layer."""
        return {**only(kept, "delta"), **{layer: product(pair) for layer, pair in unpack(kept).items()}}

    def training_deltas(self, kept: Kept) -> Deltas:
        """Return the changes of the base's weights with which the next task is trained."""
        return self.deltas(kept)

    def start(self, gaussian: Pairs, kept: Kept) -> Pairs:
        """Return the start values of a task's pairs, from the usual ones and the previous task's state, which is not empty."""
        return gaussian

    @abstractmethod
    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        """Return the state to keep after a task, from the previous state (empty after the base) and this task's pairs."""

    def trainable(self, unet: UNet2DModel, kept: Kept) -> Trainable:
        add_deltas(unet, self.training_deltas(kept))
        targets = self.target_modules(unet)
        arrange(unet, self.setting.training, compiled=self.setting.training.torch_compile)
        unet.requires_grad_(False)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets, init_lora_weights="gaussian")
        model = get_peft_model(unet, config, adapter_name=_ADAPTER)
        if kept:
            set_pairs(model, self.start(get_pairs(model), kept))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        vectors = parameters[CLASS_VECTORS] = unet.get_parameter(CLASS_VECTORS)
        vectors.requires_grad_()
        return Trainable(model, parameters)

    def learned(self, trainable: Trainable, kept: Kept) -> dict[str, torch.Tensor]:
        return self.merge(kept, get_pairs(trainable.module))

    def load(self, unet: UNet2DModel, kept: Kept) -> None:
        add_deltas(unet, self.deltas(kept))

    def trained_bytes(self, base: int) -> int:
        return 4 * self.rank * sum(sum(weight.shape) for weight in self._weights().values())

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the weights `(out, in)` of the layers that get a LoRA, without values."""
        shape = base_shape(self.setting)
        return {name: shape.get_parameter(f"{name}.weight").flatten(1) for name in self.target_modules(shape)}


class NaiveLora(LowRank):
    """One pair of matrices for each layer, which every task trains further."""

    name = "naive_lora"

    def training_deltas(self, kept: Kept) -> Deltas:
        return {}

    def start(self, gaussian: Pairs, kept: Kept) -> Pairs:
        return unpack(kept)

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        return pack(learned)


class MergeInit(LowRank):
    """Adds every task's product to the weights; the next task starts a new pair."""

    name = "merge_init"

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        past = only(kept, "delta")
        return {f"{layer}/delta": past.get(layer, 0) + product(pair) for layer, pair in learned.items()}


class MergeOrthogonal(MergeInit):
    """Like merge_init, but new pairs start orthogonal to what was learned, and there are four forms of the sum."""

    name = "merge_orthogonal"
    options_class = MergeOrthogonalOptions

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.grows_with_tasks = self.options.merge == "concat"  # by a pair for every task

    def check(self) -> None:
        super().check()
        if self.options.orthogonal == "nullspace":
            self._check_dimensions()
        elif self.rank == 1:
            raise ValueError(
                "`rank` is 1, for which orthogonal='released' starts A at zero, so that nothing is learned: take 2 or more, or "
                "orthogonal=nullspace."
            )

    def start(self, gaussian: Pairs, kept: Kept) -> Pairs:
        if self.options.orthogonal == "released":
            old = only(kept, "A")
            return {layer: Pair(rank_space_start(A, old[layer]), B) for layer, (A, B) in gaussian.items()}
        past = self.deltas(kept)
        return {layer: Pair(nullspace_start(A, row_space(past[layer])), B) for layer, (A, B) in gaussian.items()}

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        if self.options.merge == "dense":
            return super().merge(kept, learned)
        past = unpack(kept)
        return pack({layer: self._joined(past[layer], pair) if past else pair for layer, pair in learned.items()})

    def _joined(self, old: Pair, new: Pair) -> Pair:
        if self.options.merge == "concat":
            return concatenated(old, new)
        if self.options.merge == "factor_sum":
            return summed_factors(old, new)
        return truncated(product(old) + product(new), self.rank)

    def _check_dimensions(self) -> None:
        """Check, before anything is trained, that the nullspace is large enough for all tasks."""
        tasks = len(self.setting.tasks) - 1
        rank_grows = self.options.merge in ("concat", "dense")
        earlier = tasks - 1 if rank_grows else int(tasks > 1)
        for name, weight in self._weights().items():
            outputs, inputs = weight.shape
            taken = min(self.rank * earlier, outputs)
            if taken + self.rank > inputs:
                other = ", or take merge=svd, which keeps the rank of what was learned" if rank_grows else ""
                raise ValueError(
                    f"`orthogonal` is 'nullspace', but before the last of {tasks} tasks with `rank` {self.rank} the layer {name} "
                    f"would have {taken} of its {inputs} inputs taken, and {self.rank} more are needed: lower the rank{other}."
                )


class MagMax(LowRank):
    """Keeps the larger of the old and the new change of each weight, by magnitude."""

    name = "magmax"
    options_class = MagMaxOptions

    def deltas(self, kept: Kept) -> Deltas:
        return {layer: self.options.scaling * delta for layer, delta in super().deltas(kept).items()}

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


def _matching(unet: UNet2DModel, targets: list[str] | str | None) -> list[str]:
    """Return the names of the convolutions and linear layers that PEFT finds by these targets: names, their ends, or one regex."""
    config = LoraConfig(target_modules=targets)
    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return [name for name in layers if check_target_module_exists(config, name)]


def add_deltas(unet: UNet2DModel, deltas: Mapping[str, torch.Tensor]) -> None:
    """Add changes `(out, in)` to the weights of layers, in place."""
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = unet.get_parameter(f"{name}.weight")
            weight.add_(delta.to(weight).view_as(weight))


def get_pairs(model: PeftModel) -> Pairs:
    """Return copies of a LoRA's matrices by layer; those of a convolution are flattened."""
    return {name: Pair(*(own.detach().flatten(1).clone() for own in pair)) for name, pair in _own_pairs(model).items()}


def set_pairs(model: PeftModel, pairs: Mapping[str, Pair]) -> None:
    """Set the matrices that `get_pairs` returns, in place."""
    with torch.no_grad():
        for name, pair in _own_pairs(model).items():
            for own, given in zip(pair, pairs[name], strict=True):
                own.copy_(given.view_as(own))


def _own_pairs(model: PeftModel) -> Pairs:
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {
        name: Pair(*(part[_ADAPTER].get_parameter("weight") for part in (layer.lora_A, layer.lora_B)))
        for name, layer in layers.items()
    }


def only(kept: Kept, what: str) -> dict[str, torch.Tensor]:
    """Return the tensors named `layer/what`, by layer."""
    return {name.rpartition("/")[0]: tensor for name, tensor in kept.items() if name.endswith(f"/{what}")}


def pack(pairs: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    """Turn pairs by layer into named tensors."""
    return {f"{layer}/{what}": matrix for layer, pair in pairs.items() for what, matrix in pair._asdict().items()}


def unpack(kept: Kept) -> Pairs:
    """Undo `pack`; other tensors are ignored."""
    B = only(kept, "B")
    return {layer: Pair(A, B[layer]) for layer, A in only(kept, "A").items()}
