"""Push a run during training: a commit for each task. Hub errors never stop training; the end of the run pushes the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo

from ..data.tasks import Task
from ..hub.push import push_all
from ..hub.repository import HubRepository
from .config import LoopArguments


logger = logging.getLogger(__name__)


class PushError(RuntimeError):
    """The run is finished and on disk, but not on the Hub."""


class Publisher:
    """Pushes a run to the repository that its arguments name.

    Raises:
        HfHubHTTPError, OSError: the repository can neither be found nor created.
    """

    def __init__(self, training: LoopArguments, tasks: Sequence[Task]) -> None:
        self.output_dir = Path(training.output_dir)
        self.license = training.hub_license
        self._tasks = tasks
        name = training.hub_model_id or self.output_dir.resolve().name
        self.repo_id = HubRepository(name, private=training.hub_private_repo).repo_id

    def end_task(self, task: Task) -> None:
        """Push what has been learned so far. The last task is pushed by `end_run`, with the results, which its cards show."""
        if task.index + 1 == len(self._tasks):
            return
        try:
            self._push(self._tasks[: task.index + 1])
        except Exception as error:
            logger.warning(
                "Task %s was not pushed to %s, the next push includes it: %s", task.index + 1, self.repo_id, error
            )

    def end_run(self) -> None:
        """Push everything that is not on the Hub yet.

        Raises:
            PushError: it could not be pushed.
        """
        try:
            self._push(self._tasks)
        except Exception as error:
            raise PushError(
                f"The run in {self.output_dir} is finished, but could not be pushed to {self.repo_id}: {error}. Push it by: "
                f"funlora push {self.output_dir} {self.repo_id}"
            ) from error

    def commits(self, tasks: Sequence[Task]) -> list[CommitInfo]:
        """Push what these tasks have learned, the first ones of the run. Return the commits."""
        ids = [task.class_ids for task in tasks]
        return push_all(self.output_dir, self.repo_id, tasks=ids, license=self.license)

    def _push(self, tasks: Sequence[Task]) -> None:
        for commit in self.commits(tasks):
            logger.info("Pushed %s: %s", commit.commit_message, commit.commit_url)
