"""F and its gradients against plain autograd, which keeps p matrices: `kernels.functional_matrix` and the reference."""

from __future__ import annotations

from functools import partial

import torch
from interleaved import Comparison, compare, main

from funlora_hf.tuner import functional, kernels


GOALS = {("cosine", True): ">= 2.5", ("cosine", False): ">= 4"}


def measure() -> list[Comparison]:
    rows = []
    for function in ("cosine", "power"):
        for learned in (True, False):
            omega = "learned" if learned else "frozen"
            rows.append(
                forward_and_backward(
                    f"{function}, omega {omega}, (256, 512)",
                    function,
                    learned,
                    goal=GOALS.get((function, learned), ""),
                )
            )
    rows.append(forward_and_backward("cosine, omega learned, (512, 1024)", "cosine", True, shape=(512, 1024)))
    rows.append(forward_and_backward("cosine, omega learned, (128, 128)", "cosine", True, shape=(128, 128)))
    return rows


def forward_and_backward(
    name: str, function: str, learned: bool, *, shape: tuple[int, int] = (256, 512), p: int = 10, goal: str = ""
) -> Comparison:
    """How many times as long the reference takes."""
    rows, columns = shape
    A, B = 1 + 0.1 * torch.randn(rows, 1), 1 + 0.1 * torch.randn(1, columns)
    alpha, omega = torch.randn(p), torch.arange(1.0, p + 1) + 0.1 * torch.randn(p)
    inputs = [tensor.requires_grad_() for tensor in (A, B, alpha, *([omega] if learned else []))]
    gradient = torch.randn(shape)

    def run(compute) -> None:
        torch.autograd.grad(compute(*inputs, function=function), inputs, gradient)

    sides = {
        "plain autograd": partial(run, functional.functional_matrix),
        "kernel": partial(run, kernels.functional_matrix),
    }
    return compare(name, sides, rounds=21, calls=5, goal=goal)


if __name__ == "__main__":
    main(__doc__, measure, __file__)
