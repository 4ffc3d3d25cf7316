"""Floating-point operations, seconds and bytes of a step, by a few of them on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode


# How long steps are timed, beside the first ones.
MEASURED_SECONDS = 2.0

Step = Callable[[int], None]


class StepCosts(NamedTuple):
    """Of a step with a whole batch.

    Args:
        flops: floating-point operations, as torch counts them: those of products of matrices and convolutions.
        kept: bytes kept for the backward pass, without parameters.
        seconds: on this machine.
    """

    flops: float
    kept: float
    seconds: float


def measure_step(step: Step, batch_size: int, device: torch.device) -> StepCosts:
    """Measure a step on batches as large as time permits, and scale the result.

    Args:
        step: runs on a batch of any size from 2.
        batch_size: images of the whole batch.
        device: where it runs.
    """
    # Not 1, of which batch normalisation may have no variance.
    (flops, kept), (more_flops, more_kept) = (_count(step, size) for size in (2, 3))
    size = min(2, batch_size)
    # Small batches are slower.
    while (seconds := _time(step, size, device)) < MEASURED_SECONDS / 8 and size < batch_size:
        size = min(4 * size, batch_size)
    repeats = max(1, round(MEASURED_SECONDS / seconds))
    seconds = median(_time(step, size, device) for _ in range(repeats))
    more = batch_size - 2
    return StepCosts(
        flops + more * (more_flops - flops), kept + more * (more_kept - kept), seconds * batch_size / size
    )


def _count(step: Step, size: int) -> tuple[int, int]:
    """FLOPs and bytes kept."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        step(size)
    return counter.get_total_flops(), sum(kept.values())


def _time(step: Step, size: int, device: torch.device) -> float:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    step(size)
    wait()
    return time.perf_counter() - started
