"""F and its gradients against the plain formula in plain autograd, which keeps p matrices for the backward pass."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from interleaved import Comparison, Findings, Skipped, bytes_saved, compare, main

from funlora_hf import functional_matrix


SHAPES = ((64, 64), (128, 128), (256, 256), (256, 512), (1280, 1280))
# (function, shape) -> goal
GOALS = {("cosine", (256, 512)): "<= 0.45", ("cosine", (1280, 1280)): "<= 0.1"}
# Of A and B, by how they deviate from 1: as after training on digits, and so wide that interpolation does not pay.
TRAINED, WIDE = 0.22, 6.0


class Case(NamedTuple):
    """
    Args:
        function: as in the config.
        shape: of F.
        spread: of the entries of A and B around 1.
        p: number of functions.
    """

    function: str = "cosine"
    shape: tuple[int, int] = (256, 512)
    spread: float = TRAINED
    p: int = 10

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.function}, {self.shape}{', wide range' if self.spread == WIDE else ''}"


def measure() -> Findings:
    keep_freed_memory()
    rows = [forward_and_backward(Case(shape=shape)) for shape in SHAPES]
    rows += [forward_and_backward(Case(shape=shape, spread=WIDE)) for shape in ((256, 256), (256, 512))]
    rows += [forward_and_backward(Case("power", shape)) for shape in ((128, 128), (256, 512))]
    skipped = []
    if shutil.which("g++") is None and not torch.cuda.is_available():
        skipped.append(Skipped("by torch.compile", "torch.compile needs a C++ compiler"))
    else:
        compute = torch.compile(functional_matrix, dynamic=True)
        rows.append(forward_and_backward(Case(), compute=compute, note=", by torch.compile"))
    return Findings(rows, skipped, facts={"matrices kept for the backward pass": kept_matrices()})


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: pages that Linux clears anew cost more than half of a row, now of one side, now of both."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_max, 0)


def forward_and_backward(
    case: Case, *, compute: Callable[..., torch.Tensor] = functional_matrix, note: str = ""
) -> Comparison:
    """How long our form takes in terms of the plain one."""
    inputs = tensors(case)
    gradient = torch.randn(case.shape)

    def run(compute: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(compute(*inputs, function=case.function), inputs, gradient)

    sides = {"functional_matrix": partial(run, compute), "plain autograd": partial(run, plain)}
    large = math.prod(case.shape) > 10**6
    goal = (
        "" if note else GOALS.get((case.function, case.shape), limit(case)) if case.spread == TRAINED else limit(case)
    )
    return compare(case.name + note, sides, rounds=7 if large else 31, calls=1 if large else 5, goal=goal)


def limit(case: Case) -> str:
    """What no row shall exceed: little over the plain formula, or what computing its terms again costs."""
    return "<= 1.5" if math.prod(case.shape) >= 256 * 256 else "<= 1.2"


def kept_matrices() -> dict[str, float]:
    """Bytes that autograd keeps of a forward, in those of F itself."""
    kept = {}
    for case in (Case(), Case(shape=(256, 256)), Case(spread=WIDE), Case("power")):
        inputs = tensors(case)
        for name, compute in {"plain": plain, "ours": functional_matrix}.items():
            of_all = bytes_saved(partial(compute, *inputs, function=case.function))
            kept[f"{case.name}, {name}"] = round(of_all / (4 * math.prod(case.shape)), 3)
    return kept


def plain(
    A: torch.Tensor, B: torch.Tensor, alpha: torch.Tensor, omega: torch.Tensor, *, function: str
) -> torch.Tensor:
    """The formula of `cosine` or `power` with learned omega, as it stands."""
    x = A * B
    if function == "cosine":
        terms = torch.cos(omega[:, None, None] * x)
    else:
        terms = x * x.abs().clamp(min=1e-6) ** (omega[:, None, None] - 1)
    return torch.tensordot(alpha, terms, dims=1) / len(alpha)


def tensors(case: Case) -> list[torch.Tensor]:
    """A, B, alpha and omega as an adapter has them after training."""
    (rows, columns), p = case.shape, case.p
    A, B = 1 + case.spread * torch.randn(rows, 1), 1 + case.spread * torch.randn(1, columns)
    alpha, omega = torch.randn(p), torch.arange(1.0, p + 1) + 0.1 * torch.randn(p)
    return [tensor.requires_grad_() for tensor in (A, B, alpha, omega)]


if __name__ == "__main__":
    main(__doc__, measure, __file__)
