"""One of two processes that share a model by FSDP; the first writes what test_sharded.py looks at, as JSON.

    sharded_run.py RANK FOLDER

Each process runs its half of a batch. What it finds is compared with the model on one process.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from peft_models import UNET, adapter_parameters, funlora_layers, output
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from funlora_hf import mixed_batch


WAYS = ("fsdp1", "fsdp1 embedding", "fsdp2", "fsdp2 root")


def shard(way: str) -> nn.Module:
    """The model with the adapters x and y, sharded."""
    model = UNET.model("x", "y")
    if way.startswith("fsdp1"):
        kinds = {nn.Conv2d, nn.Embedding} if way == "fsdp1 embedding" else {nn.Conv2d}
        return FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy(kinds), use_orig_params=True, device_id=torch.device("cpu")
        )
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            fully_shard(module)
    if way == "fsdp2 root":
        fully_shard(model)
    return model


def loss(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return output(model(**inputs)).square().mean()


def gradients(model: nn.Module, way: str) -> dict[str, torch.Tensor]:
    """Of the adapter x, whole, the mean of both processes'."""
    if way.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                for name, p in adapter_parameters(model, "x").items()
            }
    found = {name: p.grad for name, p in adapter_parameters(model, "x").items()}
    if way == "fsdp2 root":
        return {name: whole(gradient) for name, gradient in found.items()}
    for gradient in found.values():
        distributed.all_reduce(gradient)
        gradient.div_(2)
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return (found - expected).abs().max().item()


def attempt(call: Callable[[], float]) -> float | str:
    """What the call returns, or the kind and text of the error that it raises."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Run:
    """What one process finds out about the model, sharded in one way."""

    def __init__(self, way: str, rank: int) -> None:
        self.way, self.inputs = way, UNET.batch(4)
        self.half = {name: value[2 * rank : 2 * rank + 2] for name, value in self.inputs.items()}
        self.alone, self.model = UNET.model("x", "y"), shard(way)
        self.expected = UNET.run(self.alone, self.half)

    def forward(self) -> float:
        return distance(UNET.run(self.model, self.half), self.expected)

    def mixed(self) -> float:
        names = ["y", "__base__"]
        with mixed_batch(self.model, names):
            found = UNET.run(self.model, self.half)
        return distance(found, UNET.run(self.alone, self.half, adapter_names=names))

    def disabled(self) -> float:
        layers = funlora_layers(self.model)
        for layer in layers:
            layer.enable_adapters(False)
        found = UNET.run(self.model, self.half)
        for layer in layers:
            layer.enable_adapters(True)
        return distance(found, UNET.run(UNET.base(), self.half))

    def gradients(self) -> float:
        loss(self.alone, self.inputs).backward()
        expected = {name: p.grad for name, p in adapter_parameters(self.alone, "x").items()}
        assert min(gradient.abs().max() for gradient in expected.values()) > 1e-7
        loss(self.model, self.half).backward()
        found = gradients(self.model, self.way)
        assert list(found) == list(expected)
        return max(distance(found[name], gradient) for name, gradient in expected.items())

    def merge(self) -> float:
        tuner = self.model.module if self.way.startswith("fsdp1") else self.model
        try:
            tuner.merge_adapter()
        except ValueError:
            assert not any(layer.merged for layer in funlora_layers(self.model))
            raise
        found = self.forward()
        tuner.unmerge_adapter()
        return found

    def delta(self) -> float:
        pairs = zip(funlora_layers(self.model), funlora_layers(self.alone), strict=True)
        deltas = [(layer.get_delta_weight("x"), other.get_delta_weight("x")) for layer, other in pairs]
        return max(distance(whole(found), expected) for found, expected in deltas)


# The last two may end the process, or leave the other one waiting.
PHASES = (("forward", "mixed", "disabled", "gradients", "forward"), ("merge", "forward"), ("delta", "forward"))


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    found: dict[str, float | str] = {}
    for phase in PHASES:
        for way in WAYS:
            run = Run(way, rank)
            for what in phase:
                key = f"{way}, after {phase[-2]}" if f"{way}, {what}" in found else f"{way}, {what}"
                found[key] = attempt(getattr(run, what))
            if rank == 0:
                (folder / "found.json").write_text(json.dumps(found))
    # gloo may abort a process that still has a group, or models of one, at its end.
    distributed.barrier()
    del run
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
