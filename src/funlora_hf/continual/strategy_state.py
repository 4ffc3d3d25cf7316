"""Store what a strategy keeps after a task, and check that it only grows if the strategy declares it."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from ..data.tasks import Task
from ..utils.files import read_mapping, read_tensors, write_json, write_tensors
from .learning import LearningStrategy
from .run_folder import RunFolder


class GrowingStateError(RuntimeError):
    """A strategy that promises a constant state keeps more than before."""


def save_task_state(path: Path, strategy: LearningStrategy) -> None:
    """Write `strategy.state_dict()` and the strategy's name."""
    write_tensors(path, strategy.state_dict(), metadata={"strategy": strategy.name})


def load_task_state(path: Path, strategy: LearningStrategy) -> None:
    """Load what `save_task_state` wrote.

    Raises:
        ValueError: the state of another strategy.
    """
    state = read_tensors(path, remedy="what the strategy kept is lost; start again with --overwrite_output_dir")
    with safe_open(path, framework="pt") as file:
        owner = (file.metadata() or {}).get("strategy", strategy.name)
    if owner != strategy.name:
        raise ValueError(
            f"{path} has the state of `strategy` {owner!r}, expected {strategy.name!r}: resume with the strategy that the run "
            "was started with, or start again with --overwrite_output_dir."
        )
    strategy.load_state_dict(state)


def keep_memory_report(folder: RunFolder, task: Task, strategy: LearningStrategy) -> None:
    """Write how much is kept after a task, and compare it with what was kept after the second task.

    The first task may make what later ones start from. What counts is the strategy's report, without what each class needs
    for itself, and its `state_dict`.

    Raises:
        GrowingStateError: it has grown, and the strategy does not declare growth.
    """
    state = sum(tensor.nbytes for tensor in strategy.state_dict().values())
    report = {**strategy.memory_report(), "state": state}
    write_json(folder.checkpoints / f"memory/task_{task.index + 1}.json", report)
    if strategy.grows_with_tasks or task.index < 2:
        return
    second = read_mapping(folder.checkpoints / "memory/task_2.json", keys=("persistent", "state"))
    before, now = (one["persistent"] - one.get("per_class", 0) + one["state"] for one in (second, report))
    if now > before:
        raise GrowingStateError(
            f"`strategy` {strategy.name!r} kept {before} bytes after task 2 and keeps {now} after task {task.index + 1}, expected "
            "no more: set grows_with_tasks = True, or free what is not needed in `end_task`."
        )


def memory_reports(folder: RunFolder) -> list[dict[str, int]]:
    """Return the reports of what was kept after each task, in order."""
    count = len(list(folder.checkpoints.glob("memory/task_*.json")))
    return [read_mapping(folder.checkpoints / f"memory/task_{number}.json") for number in range(1, count + 1)]
