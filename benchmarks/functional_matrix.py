"""F and its gradients against plain autograd, which keeps p matrices: `kernels.functional_matrix` and the reference."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from interleaved import Comparison, Findings, Skipped, bytes_saved, compare, main

from funlora_hf.tuner import functional, kernels


SHAPE = (256, 512)
# (function, omega learned, compiled) -> goal
GOALS = {
    ("cosine", True, False): ">= 2.5",
    ("cosine", False, False): ">= 4",
    ("cosine", True, True): ">= 4",
    ("cosine", False, True): ">= 15",
}


def measure() -> Findings:
    rows, skipped = [], []
    for function in ("cosine", "power"):
        for learned in (True, False):
            rows.append(forward_and_backward(Case(function, learned)))
    for learned in (True, False):
        case = Case("cosine", learned, compiled=True)
        if shutil.which("g++") is None and not torch.cuda.is_available():
            skipped.append(Skipped(case.name, "torch.compile needs a C++ compiler"))
        else:
            rows.append(forward_and_backward(case))
    for shape in ((512, 1024), (128, 128)):
        rows.append(forward_and_backward(Case("cosine", True, shape=shape)))
    return Findings(rows, skipped, facts={"matrices kept for the backward pass": kept_matrices()})


class Case(NamedTuple):
    """
    Args:
        function: as in the config.
        learned: whether omega is.
        compiled: by `torch.compile`.
        shape: of F.
        p: number of functions.
    """

    function: str
    learned: bool
    compiled: bool = False
    shape: tuple[int, int] = SHAPE
    p: int = 10

    @property
    def name(self) -> str:
        """Of the row."""
        compiled = ", compiled" if self.compiled else ""
        return f"{self.function}, omega {'learned' if self.learned else 'frozen'}, {self.shape}{compiled}"


def forward_and_backward(case: Case) -> Comparison:
    """How many times as long the reference takes."""
    inputs = tensors(case)
    gradient = torch.randn(case.shape)

    def run(compute: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(compute(*inputs, function=case.function), inputs, gradient)

    sides = {
        "plain autograd": partial(run, functional.functional_matrix),
        "kernel": partial(run, partial(kernels.functional_matrix, compiled=case.compiled)),
    }
    goal = GOALS.get((case.function, case.learned, case.compiled), "") if case.shape == SHAPE else ""
    return compare(case.name, sides, rounds=41, calls=5, goal=goal)


def kept_matrices() -> dict[str, float]:
    """Bytes that autograd keeps of a forward, in those of F itself."""
    kept = {}
    for function in ("cosine", "power"):
        inputs = tensors(Case(function, learned=True))
        forms = {"plain autograd": functional.functional_matrix, "kernel": kernels.functional_matrix}
        for name, compute in forms.items():
            bytes_of_all = bytes_saved(partial(compute, *inputs, function=function))
            kept[f"{function}, {name}"] = round(bytes_of_all / (4 * math.prod(SHAPE)), 3)
    return kept


def tensors(case: Case) -> list[torch.Tensor]:
    """A, B, alpha and, if it is learned, omega, near where training starts."""
    (rows, columns), p = case.shape, case.p
    A, B = 1 + 0.1 * torch.randn(rows, 1), 1 + 0.1 * torch.randn(1, columns)
    alpha, omega = torch.randn(p), torch.arange(1.0, p + 1) + 0.1 * torch.randn(p)
    return [tensor.requires_grad_() for tensor in (A, B, alpha, *([omega] if case.learned else []))]


if __name__ == "__main__":
    main(__doc__, measure, __file__)
