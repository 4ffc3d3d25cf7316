"""Differences between CPU and GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to a device; a copy from the CPU to a GPU does not wait for the GPU's pending work."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def deterministic_kernels(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """On a GPU and if `wanted`, use only deterministic kernels, with a warning where torch has none.

    Afterwards all settings are restored, except CUBLAS_WORKSPACE_CONFIG, which cuBLAS reads once per process.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
