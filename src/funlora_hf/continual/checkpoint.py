"""Checkpoints inside a phase: safetensors and JSON, never pickled, whole or not at all.

Order, noise and dropout of every step are derived from the run's seed (seeds.py), so the step says all of the random
state and of the position in the data. Knows optimisers and tensors; knows nothing of strategies.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import read_json, whole_folder, write_json


_STEP = "step_"
_TENSORS = "state.safetensors"
_NUMBERS = "state.json"


@dataclass
class TrainingState:
    """What the running phase trains.

    Args:
        parameters: by name.
        optimizer: the plain optimiser of exactly these parameters, in this order.
        ema: their moving average.
        buffers: by name, that training changes besides.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the state on the CPU, by a flat name."""
        tensors = {f"buffer/{name}": buffer for name, buffer in self.buffers.items()}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            tensors[f"parameter/{name}"] = parameter.detach()
            tensors[f"ema/{name}"] = self.ema.shadow_params[index]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def load(self, tensors: Mapping[str, torch.Tensor], ema_step: int) -> None:
        """The inverse of `tensors`, in place."""
        for index, (name, parameter) in enumerate(self.parameters.items()):
            parameter.data.copy_(tensors[f"parameter/{name}"])
            self.ema.shadow_params[index].copy_(tensors[f"ema/{name}"])
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, state_name, name = key.split("/", 2)
                parameter = self.parameters[name]
                self.optimizer.state[parameter][state_name] = self._like(value, parameter)
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors[f"buffer/{name}"])
        self.ema.optimization_step = ema_step

    def _like(self, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """A copy of an optimiser's tensor where the optimiser keeps it."""
        if value.dim() == 0:
            # Adam keeps its step counter on the CPU, but beside the parameter if it is fused.
            return value.clone().to(parameter.device if self.optimizer.defaults.get("fused") else "cpu")
        # With the parameter's strides: a fused optimiser takes all tensors of a parameter entry by entry.
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def save_checkpoint(folder: Path, step: int, state: TrainingState) -> Path:
    """Write `folder/step_<step>/` and drop the older ones once it is there."""
    path = folder / f"{_STEP}{step}"
    with whole_folder(path) as temporary:
        save_file(state.tensors(), temporary / _TENSORS)
        write_json(temporary / _NUMBERS, {"step": step, "ema_step": state.ema.optimization_step})
    for older in _checkpoints(folder):
        if older != path:
            shutil.rmtree(older, ignore_errors=True)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path, state: TrainingState) -> int:
    """Load a checkpoint in place.

    Returns:
        The number of optimiser steps done.

    Raises:
        ValueError: it holds other tensors than the phase trains, so it is of another configuration.
    """
    tensors, numbers = load_file(path / _TENSORS), read_json(path / _NUMBERS)
    for name, parameter in state.parameters.items():
        saved = tensors.get(f"parameter/{name}")
        if saved is None or saved.shape != parameter.shape:
            found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
            raise ValueError(
                f"The checkpoint {path} is of another configuration: for {name} it holds {found}, expected shape "
                f"{tuple(parameter.shape)}. Resume with the settings it was written with, or start anew with "
                "--overwrite_output_dir."
            )
    state.load(tensors, numbers["ema_step"])
    return numbers["step"]


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{_STEP}*") if path.name.removeprefix(_STEP).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_STEP)))
