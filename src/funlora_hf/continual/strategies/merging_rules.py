"""The four rules of "Low-Rank Continual Personalization": where the LoRA of a task starts, and how it joins those of earlier tasks.

A rule knows layers only by name and shape, so U-Nets of classes and models of prompts use the same ones. What it keeps is a
mapping of tensors named `layer/what`: A and B of a pair, or a dense change.

Source: arXiv 2410.04891: rules [text], details [code] where a docstring says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from ...utils.field_types import Range, check_field_types, one_of
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


Kept = Mapping[str, torch.Tensor]
Deltas = dict[str, torch.Tensor]
Pairs = dict[str, Pair]


@dataclass
class RuleOptions:
    """The options of a rule; most have none."""

    def __post_init__(self) -> None:
        check_field_types(self)


@dataclass
class MergeOrthogonalRuleOptions(RuleOptions):
    """
    Args:
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
class MagMaxRuleOptions(RuleOptions):
    """
    Args:
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


class MergingRule(ABC):
    """
    Args:
        rank: rank of a task's pairs.
        options: the options of the strategy, which have those of the rule.
    """

    name: ClassVar[str]
    grows: bool = False
    """Whether what is kept grows with every task."""

    def __init__(self, rank: int, options: Any) -> None:
        self.rank, self.options = rank, options

    def check(self, shapes: Mapping[str, tuple[int, int]], tasks: int) -> None:  # noqa: B027 - most fit every layer
        """Raise a ValueError unless so many tasks fit layers with weights of these shapes, `(out, in)` by name."""

    def deltas(self, kept: Kept) -> Deltas:
        """Return the changes of the base's weights in the generator after a task, `(out, in)` by layer."""
        return {**only(kept, "delta"), **{layer: product(pair) for layer, pair in unpack(kept).items()}}

    def training_deltas(self, kept: Kept) -> Deltas:
        """Return the changes of the base's weights with which the next task is trained."""
        return self.deltas(kept)

    def start(self, gaussian: Pairs, kept: Kept) -> Pairs:
        """Return the start values of a task's pairs, from the usual ones and the previous task's state, which is not empty."""
        return gaussian

    def penalty(self, kept: Kept, pairs: Pairs) -> torch.Tensor | float:
        """Return what the pairs in training add to the loss, in their precision, given the previous task's state, maybe empty."""
        return 0.0

    @abstractmethod
    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        """Return the state to keep after a task, from the previous state (empty after the base) and this task's pairs."""


class NaiveLoraRule(MergingRule):
    """One pair of matrices for each layer, which every task trains further."""

    name = "naive_lora"

    def training_deltas(self, kept: Kept) -> Deltas:
        return {}

    def start(self, gaussian: Pairs, kept: Kept) -> Pairs:
        return unpack(kept)

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        return pack(learned)


class MergeInitRule(MergingRule):
    """Adds every task's product to the weights; the next task starts a new pair."""

    name = "merge_init"

    def merge(self, kept: Kept, learned: Pairs) -> dict[str, torch.Tensor]:
        past = only(kept, "delta")
        return {f"{layer}/delta": past.get(layer, 0) + product(pair) for layer, pair in learned.items()}


class MergeOrthogonalRule(MergeInitRule):
    """Like merge_init, but new pairs start orthogonal to what was learned, and there are four forms of the sum."""

    name = "merge_orthogonal"

    def __init__(self, rank: int, options: Any) -> None:
        super().__init__(rank, options)
        self.grows = options.merge == "concat"  # by a pair for every task

    def check(self, shapes: Mapping[str, tuple[int, int]], tasks: int) -> None:
        if self.options.orthogonal == "nullspace":
            self._check_dimensions(shapes, tasks)
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

    def _check_dimensions(self, shapes: Mapping[str, tuple[int, int]], tasks: int) -> None:
        """Check, before anything is trained, that the nullspace is large enough for all tasks."""
        rank_grows = self.options.merge in ("concat", "dense")
        earlier = tasks - 1 if rank_grows else int(tasks > 1)
        for name, (outputs, inputs) in shapes.items():
            taken = min(self.rank * earlier, outputs)
            if taken + self.rank > inputs:
                other = ", or take merge=svd, which keeps the rank of what was learned" if rank_grows else ""
                raise ValueError(
                    f"`orthogonal` is 'nullspace', but before the last of {tasks} tasks with `rank` {self.rank} the layer {name} "
                    f"would have {taken} of its {inputs} inputs taken, and {self.rank} more are needed: lower the rank{other}."
                )


class MagMaxRule(MergingRule):
    """Keeps the larger of the old and the new change of each weight, by magnitude."""

    name = "magmax"

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
