"""Checkpoints inside a phase: safetensors, never pickled, whole or not at all, with a checksum.

Order, noise and dropout of every step are derived from the run's seed, so the number of the step determines the random state
and the position in the data.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..utils.files import file_sha256, remove_folder, whole_folder
from .loss_curve import LossCurve


logger = logging.getLogger(__name__)

_STEP = "step_"
_TENSORS = "state.safetensors"
# In the format of `sha256sum --check`.
_CHECKSUM = "state.sha256"


@dataclass
class TrainingState:
    """The state of a phase in training.

    Args:
        parameters: the trained parameters, by name.
        optimizer: the plain optimizer of exactly these parameters, in this order.
        ema: their moving average.
        buffers: the buffers that training also changes, by name.
        skipped: how many steps were skipped because loss or gradient was not finite: "total" in the phase, including those by
            which fp16 finds its scale; "in_row" since the last completed step, without those; "rescaled_in_row" only those.
        scaler: the scaler of the loss under fp16, whose scale decides which steps are skipped; None: there is none.
        started: when the phase began in this process, by `time.perf_counter`.
        earlier_seconds: how long it took in earlier processes, up to the checkpoint that this one continues from.
        started_from: the adapters that the parameters started from, with their hashes.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("total", "in_row", "rescaled_in_row"), 0))
    losses: LossCurve = field(default_factory=lambda: LossCurve(1))
    scaler: torch.amp.GradScaler | None = None
    started: float = field(default_factory=time.perf_counter)
    earlier_seconds: float = 0.0
    started_from: Mapping[str, str] = field(default_factory=dict)

    def seconds(self) -> float:
        """Return how long the phase has taken until now, in all processes that worked on it one after another."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def numbers(self) -> dict[str, str]:
        """Return the rest of the state, as the metadata of a file."""
        skipped = {f"skipped_{name}": str(count) for name, count in self.skipped.items()}
        numbers = {"ema_step": str(self.ema.optimization_step), "losses": self.losses.state(), **skipped}
        numbers["seconds"] = str(self.seconds())
        numbers["started_from"] = json.dumps(self.started_from)
        return numbers if self.scaler is None else {**numbers, "scaler": json.dumps(self.scaler.state_dict())}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the state on the CPU, by a flat name."""
        tensors = {f"buffer/{name}": buffer for name, buffer in self.buffers.items()}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            tensors[f"parameter/{name}"] = parameter.detach()
            tensors[f"ema/{name}"] = self.ema.shadow_params[index]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def load(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, str]) -> None:
        """Load what `tensors` and `numbers` gave, in place."""
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
        self.ema.optimization_step = int(numbers["ema_step"])
        # Checkpoints of earlier versions may lack the seconds, the counts, the losses and the scaler.
        self.earlier_seconds = float(numbers.get("seconds", 0.0))
        self.skipped = {name: int(numbers.get(f"skipped_{name}", 0)) for name in self.skipped}
        if "losses" in numbers:
            self.losses.load(numbers["losses"])
        if self.scaler is not None and "scaler" in numbers:
            self.scaler.load_state_dict(json.loads(numbers["scaler"]))

    def _like(self, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Copy a tensor of the optimizer to where the optimizer keeps it."""
        if value.dim() == 0:
            # Adam keeps its step counter on the CPU; fused Adam keeps it on the device of the parameter.
            return value.clone().to(parameter.device if self.optimizer.defaults.get("fused") else "cpu")
        if value.shape != parameter.shape:
            # 8-bit optimizers keep the scales of blocks, and a table of their numbers.
            return value.clone().to(parameter.device)
        # With the parameter's strides, since a fused optimizer reads all tensors of a parameter in the order of memory.
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def save_checkpoint(folder: Path, step: int, state: TrainingState, *, total_limit: int | None) -> Path:
    """Write `folder/step_<step>/` and then delete the oldest beyond `total_limit`; None keeps all."""
    path = folder / f"{_STEP}{step}"
    with whole_folder(path) as temporary:
        save_file(state.tensors(), temporary / _TENSORS, metadata={"step": str(step), **state.numbers()})
        checksum = f"{file_sha256(temporary / _TENSORS)}  {_TENSORS}\n"
        (temporary / _CHECKSUM).write_text(checksum, encoding="utf-8")
    if total_limit is not None:
        for older in _checkpoints(folder)[:-total_limit]:
            remove_folder(older)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step, or None."""
    return next(reversed(_checkpoints(folder)), None)


def load_newest(folder: Path, state: TrainingState) -> int:
    """Load the newest checkpoint that is not damaged, in place; log each damaged one; delete those of another start.

    Returns:
        The number of optimizer steps done; 0, with the state unchanged, if there is no valid checkpoint.

    Raises:
        ValueError: it has other tensors than the phase trains, so it belongs to another configuration.
    """
    for path in reversed(_checkpoints(folder)):
        if damage := _damage(path):
            logger.warning(
                "The checkpoint %s is damaged: %s. Going back to the one before it, or to the start of the phase.",
                path,
                damage,
            )
            continue
        with safe_open(path / _TENSORS, framework="pt") as file:
            tensors, numbers = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        # Those of earlier versions started from none.
        if json.loads(numbers.get("started_from", "{}")) != state.started_from:
            logger.warning(
                "%s: its steps are dropped, since adapters that they started from have changed or are gone", path
            )
            remove_folder(path)  # those to come have lower steps
            continue
        for name, parameter in state.parameters.items():
            saved = tensors.get(f"parameter/{name}")
            if saved is None or saved.shape != parameter.shape:
                found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                raise ValueError(
                    f"The checkpoint {path} is of another configuration: for {name} it has {found}, expected shape "
                    f"{tuple(parameter.shape)}. Resume with the settings that it was written with, or start again with "
                    "--overwrite_output_dir."
                )
        state.load(tensors, numbers)
        return int(numbers["step"])
    return 0


def _damage(path: Path) -> str | None:
    """Say what is wrong with the files of a checkpoint; None: they are unchanged."""
    try:
        written = (path / _CHECKSUM).read_text(encoding="utf-8").split(maxsplit=1)[:1]
        found = file_sha256(path / _TENSORS)
    except (OSError, ValueError) as error:
        return str(error)
    return None if written == [found] else f"the SHA-256 of {_TENSORS} is {found}, expected {' '.join(written)}"


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{_STEP}*") if path.name.removeprefix(_STEP).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_STEP)))
