"""ContinualTrainer: run the phases of a strategy, task after task, on one process or many."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..adapters.class_folder import adapter_name
from ..data.tasks import Task
from ..utils.files import read_json, remove_folder, write_json
from ..utils.progress import Progress, duration
from ..utils.seeds import derive_seed
from .checkpoint import TrainingState, latest_checkpoint, load_newest, save_checkpoint
from .compilation import compilation_errors
from .config import LoopArguments
from .guarded_steps import GuardedSteps, Outcome
from .learning import BatchSource, LearningStrategy, Phase, PhaseSettings, Trainable
from .loss_curve import LossCurve
from .run_folder import RunFolder
from .strategy_state import keep_memory_report, load_task_state, save_task_state
from .termination import Termination
from .time_limit import TimeLimit, TimeLimitReached


logger = logging.getLogger(__name__)

# Folder of the seconds that a task took before its phases.
PREPARATION = "preparation"
# On a GPU, losses are read once in so many steps: to read one, the process waits for the GPU, which then has nothing to do.
STEPS_BETWEEN_READS = 25
# Reasons to stop: if processes have several, all take the largest. 0: none.
_TIME, _SIGNAL = 1, 2
# What is still to be read of a step: its number, its learning rate, the loss of each of its batches and its outcome, all scalars.
Pending = tuple[int, float, list[torch.Tensor], torch.Tensor]


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite, and stayed so."""


class Listener(Protocol):
    """Something that the trainer calls after each task."""

    def end_task(self, task: Task) -> None:
        """Called by every process when all results of a task are on disk."""


@dataclass(eq=False, repr=False)
class ContinualTrainer:
    """Runs a strategy over tasks.

    Args:
        strategy ([`LearningStrategy`]): what is trained, and how; its setting has the tasks.
        batches (`Callable`): makes the [`BatchSource`] of a phase at its start.
        folder ([`RunFolder`]): the folder of the run, opened already.
        listeners (sequence of [`Listener`], *optional*): called after every task, one after the other.
        limit ([`TimeLimit`], *optional*): when to stop; None: never.
        termination ([`Termination`], *optional*): whether SIGTERM or SIGINT has come; None: signals are not handled.
    """

    strategy: LearningStrategy
    batches: Callable[[Phase], BatchSource]
    _: KW_ONLY
    folder: RunFolder
    accelerator: Accelerator
    listeners: Sequence[Listener] = ()
    limit: TimeLimit | None = None
    termination: Termination | None = None

    def __post_init__(self) -> None:
        self.tasks, self.training = self.strategy.setting.tasks, self.strategy.setting.training
        self._limit, self._termination = self.limit or TimeLimit(None), self.termination or Termination()
        # Processes ask each other only if a reason to stop is possible.
        self._asks = bool(self.limit) or self.termination is not None
        self._task_of = {class_id: task.index for task in self.tasks for class_id in task.class_ids}
        scaler, on_cpu = self.accelerator.scaler, self.accelerator.device.type == "cpu"
        self._fresh_scale = None if scaler is None else scaler.state_dict()
        self._read_every = 1 if on_cpu else STEPS_BETWEEN_READS
        self._told: set[PhaseSettings] = set()  # those about which this process has warned

    def train(self) -> None:
        """Run every phase that is not finished yet, and the evaluation after every task.

        Raises:
            NonFiniteLossError: the loss or its gradient was not finite for more than `max_nonfinite_steps` steps in a row; it
                names the class and the step. The last checkpoint is kept.
            TimeLimitReached: on all processes, with a checkpoint if one was in the middle of a phase.
            Terminated: likewise, but without waiting for processes that train their own phases and got no signal.
            FileNotFoundError: the run's folder was deleted or moved during the run.
            WriteError: a file could not be written; what is finished is safe.
            ValueError: more processes than images in a batch that they share.
        """
        self.folder.check_there()
        for task in self.tasks:
            restored = self._restore_task(task)
            if not restored:
                self._learn_task(task)
            self.accelerator.wait_for_everyone()
            if self.listeners:
                # Tasks that an earlier run has trained are evaluated even if the time is over, so that each run makes progress.
                if not restored:
                    self._stop_if(self._due(shared=True), f"before the evaluation of task {task.index + 1}")
                self.folder.check_there()
                for listener in self.listeners:
                    listener.end_task(task)
                self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Load what the strategy keeps after its last task; train nothing.

        Raises:
            ValueError: a task is not finished, or its results are gone.
        """
        for task in self.tasks:
            if not self._restore_task(task):
                raise ValueError(
                    f"Task {task.index + 1} of the run in {self.folder.path} is not finished, or one of its classes is gone: "
                    "--resume_from_checkpoint latest trains what is missing."
                )

    def learn_beside(self, task: Task) -> None:
        """Train a task that does not belong to the run and is not evaluated. Raises what `train` does."""
        self._run_phases(list(self.strategy.phases(task)))
        self.accelerator.wait_for_everyone()

    def update_class(self, class_id: int) -> None:
        """Train the adapter of one class again, on its present images; no other file of the run changes.

        The picture of the class's samples is deleted, since it shows samples of the old adapter.

        Raises:
            ValueError: the strategy has no adapters, or the class has none.
            TimeLimitReached: as `train`.
        """
        strategy, adapters = self.strategy, self.folder.adapters
        if strategy.method_name is None:
            raise ValueError(
                f"`update_class` needs a strategy that trains each class alone, and `strategy` is {strategy.name!r}."
            )
        if not (adapters / adapter_name(class_id)).is_dir():
            known = sorted(path.name for path in adapters.iterdir())
            raise ValueError(
                f"`update_class` is {class_id}, expected a class with an adapter of its own: {', '.join(known)}. The "
                "classes of the base are frozen."
            )
        settings = PhaseSettings.of(self.training, "adapter")
        phase = Phase(f"update_{adapter_name(class_id)}", (class_id,), settings, independent=True)
        mine = [phase] if self.accelerator.is_main_process else []
        self._run_in_time(mine, lambda phase: strategy.build_update(class_id))
        if mine:
            self.folder.class_figure(class_id).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def _learn_task(self, task: Task) -> None:
        phases = list(self.strategy.phases(task))
        self._check_access(task, phases)
        started = time.perf_counter()
        self.strategy.begin_task(task)
        self.folder.check_there()
        if self.accelerator.is_main_process:
            self._record_preparation(task, time.perf_counter() - started)
        # Phases of other processes may read what was prepared from disk.
        self.accelerator.wait_for_everyone()
        self._run_phases(phases)
        self.accelerator.wait_for_everyone()
        self.strategy.end_task(task)
        if self.accelerator.is_main_process:
            keep_memory_report(self.folder, task, self.strategy)
            # Last, since a task with this file is not begun again.
            save_task_state(self._task_state(task), self.strategy)

    def _check_access(self, task: Task, phases: list[Phase]) -> None:
        """Refuse real images of other tasks, unless the strategy declares that it needs them."""
        for phase in phases:
            others = sorted(set(phase.class_ids) - set(task.class_ids))
            if others and "all_tasks" not in self.strategy.requires:
                raise ValueError(
                    f"Phase {phase.name!r} of `strategy` {self.strategy.name!r} asks for real images of classes {others}, "
                    f"which task {task.index + 1} does not have. A strategy that must see them says so: requires = "
                    'frozenset({"all_tasks"}).'
                )

    def _restore_task(self, task: Task) -> bool:
        """Load the strategy's state after a task if an earlier run has finished the task; returns whether it has."""
        path = self._task_state(task)
        finished = path.is_file() and all(self.strategy.is_finished(phase) for phase in self.strategy.phases(task))
        if finished:
            load_task_state(path, self.strategy)
        return finished

    def _task_state(self, task: Task) -> Path:
        return self.folder.checkpoints / "strategy" / f"task_{task.index + 1}.safetensors"

    def _record_preparation(self, task: Task, seconds: float) -> None:
        # A task that is begun again after a restart adds to its earlier time.
        path = self.folder.checkpoints / PREPARATION / f"task_{task.index + 1}.json"
        before = read_json(path)["seconds"] if path.is_file() else 0.0
        write_json(path, {"seconds": before + seconds, "task": task.index})

    def _run_phases(self, phases: list[Phase]) -> None:
        shared = [phase for phase in phases if not phase.independent]
        independent = [phase for phase in phases if phase.independent]
        # Each process's share depends only on the list, not on what is finished, so a resumed run divides the work the same way.
        mine = independent[self.accelerator.process_index :: self.accelerator.num_processes]
        for phase in shared:
            if phase.settings.batch_size < self.accelerator.num_processes:
                raise ValueError(
                    f"The batch of phase {phase.name!r} has {phase.settings.batch_size} images for "
                    f"{self.accelerator.num_processes} processes: give larger batches (`..._batch_size`), or start fewer processes."
                )
        finished = [phase for phase in [*shared, *mine] if self.strategy.is_finished(phase)]
        for phase in finished:
            self._drop_checkpoints(phase)
        self._run_in_time([phase for phase in [*shared, *mine] if phase not in finished], self.strategy.build)

    def _run_in_time(self, phases: list[Phase], build: Callable[[Phase], Trainable]) -> None:
        """Run this process's phases; at the end, all processes stop if the time of one of them was over."""
        try:
            for phase in phases:
                self._stop_if(self._due(shared=not phase.independent), f"before phase {phase.name!r}")
                self._run_phase(phase, build)
                if not phase.independent:
                    self.accelerator.wait_for_everyone()
        except TimeLimitReached:
            self._agreed(_TIME)
            raise
        self._stop_if(self._agreed(0), "since another process had to stop")

    def _due(self, *, shared: bool) -> int:
        """Return the reason to stop now, of this process, or, with `shared`, of all processes, all of which call this."""
        reason = _SIGNAL if self._termination.requested else _TIME if self._limit.is_over else 0
        return self._agreed(reason) if shared else reason

    def _agreed(self, reason: int) -> int:
        """Return the largest reason of any process; all of them call this."""
        if self.accelerator.num_processes == 1 or not self._asks:
            return reason
        return int(self.accelerator.gather(torch.tensor([reason], device=self.accelerator.device)).max())

    def _stop_if(self, reason: int, where: str) -> None:
        if reason:
            raise {_TIME: self._limit.reached, _SIGNAL: self._termination.error}[reason](where)

    def _run_phase(self, phase: Phase, build: Callable[[Phase], Trainable]) -> None:
        started = time.perf_counter()
        batches = self.batches(phase)
        torch.manual_seed(derive_seed(self.training.seed, phase.name, "start"))
        trainable = build(phase)
        try:
            with self._termination.deferred():
                with compilation_errors():
                    record = self._train(phase, trainable, batches, started)
                if self._writes(phase):
                    self.folder.check_there()
                    # Before the phase ends, since a finished phase is not run again.
                    self._record_seconds(phase, record)
                    self.strategy.end_phase(phase, trainable)
                    loss = next((mean for mean in reversed(record["losses"]) if mean is not None), math.nan)
                    logger.info(
                        "phase %s: %d steps in %s, loss %.4f",
                        phase.name,
                        record["steps"],
                        duration(record["seconds"]),
                        loss,
                    )
        finally:
            self.strategy.release_phase(phase, trainable)
            self.accelerator.free_memory()
        self._drop_checkpoints(phase)

    def _train(self, phase: Phase, trainable: Trainable, batches: BatchSource, started: float) -> dict[str, Any]:
        """Return the phase's seconds and steps, how many of them were skipped, the average's decay in the last one, and means of the loss."""
        accelerator, training = self.accelerator, self.training
        steps = phase_steps(phase.settings, batches.num_images, training)
        if steps < phase.settings.warmup_steps and self._writes(phase) and phase.settings not in self._told:
            self._told.add(phase.settings)
            logger.warning(
                "phase %s: its %d steps end in the warm-up of %d, in which the learning rate reaches %.2g instead of %.2g",
                phase.name,
                steps,
                phase.settings.warmup_steps,
                learning_rate(phase.settings, steps - 1, steps),
                phase.settings.learning_rate,
            )
        state = self._training_state(phase, trainable, steps)
        state.started = started
        resumes = training.resume_from_checkpoint is not None
        done = load_newest(self.folder.checkpoints / phase.name, state) if resumes else 0
        guard = GuardedSteps(state, accelerator, shared=not phase.independent, max_grad_norm=training.max_grad_norm)
        module = trainable.module if phase.independent else accelerator.prepare_model(trainable.module)
        pending: list[Pending] = []

        with Progress(
            steps,
            phase.name,
            initial=done,
            disable=not self._writes(phase),
            # Each process shows its independent phases on a line of its own.
            position=accelerator.process_index,
        ) as bar:
            for step in range(done, steps):
                # Processes that share the phase ask each other only when losses have been read, since they wait then anyway.
                asks = phase.independent or accelerator.num_processes == 1 or not pending
                if step > done and asks and (reason := self._due(shared=not phase.independent)):
                    self._read(phase, pending, guard, bar)
                    self._checkpoint(phase, step, state)
                    self._stop_if(reason, f"after step {step} of {steps} of phase {phase.name!r}")
                rate = learning_rate(phase.settings, step, steps)
                for group in state.optimizer.param_groups:
                    group["lr"] = group["factor"] * rate
                pending.append((step, rate, *self._step(phase, module, batches, step, guard)))
                if len(pending) >= self._read_every:
                    self._read(phase, pending, guard, bar)
                self.strategy.after_step(phase)
                bar.update()
                if (step + 1) % training.checkpointing_steps == 0 and step + 1 < steps:
                    self._read(phase, pending, guard, bar)
                    self._checkpoint(phase, step + 1, state)
            self._read(phase, pending, guard, bar)
        if not phase.independent:
            accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        state.ema.copy_to(trainable.parameters.values())
        self._check_finite(phase, steps, trainable.parameters.values())
        skipped = state.skipped["total"]
        if skipped == steps:
            found = "No step could be done, since loss or gradient is not finite,"
            raise self._non_finite(phase, steps - 1, found, skipped)
        if skipped:
            # fp16 always skips some.
            logger.log(
                logging.WARNING if accelerator.scaler is None else logging.INFO,
                "%d of %d steps of phase %r were skipped, since loss or gradient was not finite.",
                skipped,
                steps,
                phase.name,
            )
        decay = state.ema.get_decay(state.ema.optimization_step)
        return {
            "seconds": state.seconds(),
            "steps": steps,
            "skipped_steps": skipped,
            "ema_decay": decay,
            "losses": state.losses.means(),
        }

    def _training_state(self, phase: Phase, trainable: Trainable, steps: int) -> TrainingState:
        settings, parameters = phase.settings, list(trainable.parameters.values())
        # A GPU uses one kernel for all parameters; on a CPU, torch chooses. Where losses are read late, only a fused optimizer can
        # skip a step without waiting.
        on_gpu = self.accelerator.device.type == "cuda"
        fused = True if on_gpu or self._read_every > 1 else None
        optimizer = self.strategy.make_optimizer(
            phase,
            trainable,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, 0.999),
            weight_decay=settings.weight_decay,
            fused=fused,
        )
        ema = moving_average(parameters, settings, steps, foreach=on_gpu)
        scaler = self.accelerator.scaler
        if scaler is not None:
            # accelerate has one scaler for all phases, but a class must not depend on the process's earlier classes.
            scaler.load_state_dict(self._fresh_scale)
        return TrainingState(
            trainable.parameters,
            optimizer,
            ema,
            trainable.buffers,
            losses=LossCurve(steps),
            scaler=scaler,
            started_from=trainable.started_from,
        )

    def _step(
        self, phase: Phase, module: Any, batches: BatchSource, step: int, guard: GuardedSteps
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Do one optimizer step; return the losses of its `gradient_accumulation_steps` batches on this process, and its
        outcome."""
        accelerator = self.accelerator
        shares = 1 if phase.independent else accelerator.num_processes
        share = 0 if phase.independent else accelerator.process_index
        accumulated = self.training.gradient_accumulation_steps
        parts, outcome = [], torch.tensor(0)
        guard.begin()
        for part in range(accumulated):
            number = step * accumulated + part
            # The random numbers of a strategy's batch and of dropout depend on the step, and differ between the shares of a batch.
            torch.manual_seed(derive_seed(self.training.seed, phase.name, "step", number, share))
            batch = self.strategy.make_batch(phase, batches.batch(number, share=share, num_shares=shares))
            with accelerator.accumulate(module):
                with accelerator.autocast():
                    losses = self.strategy.training_step(phase, batch, module)
                # DDP averages over processes: with this weight, the result is the mean over the whole batch, even if its
                # shares are not equal.
                loss = losses.sum() * shares / phase.settings.batch_size
                parts.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    outcome = guard.end(parts)
        return parts, outcome

    def _read(self, phase: Phase, pending: list[Pending], guard: GuardedSteps, bar: Progress) -> None:
        """Read the losses from the device, all at once, log them, and count the skipped steps."""
        if not pending:
            return
        scalars = torch.stack([scalar for *_, losses, outcome in pending for scalar in (*losses, outcome)])
        if not phase.independent:
            # Each process has the losses of its share of a batch, and all have the same outcome.
            scalars = self.accelerator.reduce(scalars, reduction="mean")
        values = iter(scalars.tolist())
        for step, rate, waiting, _ in pending:
            losses, outcome = [next(values) for _ in waiting], Outcome(int(next(values)))
            guard.count(outcome)
            if guard.exceed(self.training.max_nonfinite_steps):
                value = next((value for value in losses if not math.isfinite(value)), math.nan)
                found = "The gradient is not finite" if outcome is Outcome.NO_GRADIENT else f"The loss is {value}"
                raise self._non_finite(phase, step, found, guard.state.skipped["in_row"])
            mean = sum(loss / len(losses) for loss in losses)
            guard.state.losses.add(step, mean)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            self.accelerator.log({f"{phase.name}/loss": mean, f"{phase.name}/lr": rate}, step=step)
        pending.clear()

    def _checkpoint(self, phase: Phase, step: int, state: TrainingState) -> None:
        self._check_finite(phase, step, state.parameters.values())
        if self._writes(phase):
            self.folder.check_there()
            limit = self.training.checkpoints_total_limit
            save_checkpoint(self.folder.checkpoints / phase.name, step, state, total_limit=limit)

    def _drop_checkpoints(self, phase: Phase) -> None:
        if self._writes(phase):
            remove_folder(self.folder.checkpoints / phase.name)

    def _writes(self, phase: Phase) -> bool:
        """Return whether this process writes the files of a phase: of its own phase, or, on the main process, of a shared one."""
        return phase.independent or self.accelerator.is_main_process

    def _check_finite(self, phase: Phase, step: int, parameters: Iterable[torch.Tensor]) -> None:
        # A step that was not skipped may still overflow a parameter, which cannot be undone.
        if not torch.stack([torch.isfinite(parameter).all() for parameter in parameters]).all():
            raise self._non_finite(phase, step - 1, "A parameter is not finite")

    def _record_seconds(self, phase: Phase, found: dict[str, Any]) -> None:
        if phase.name.startswith("update_"):
            return
        tasks = {self._task_of.get(class_id) for class_id in phase.class_ids}
        record = {
            **found,
            "images": found["steps"] * images_per_step(phase.settings, self.training),
            "process": self.accelerator.process_index,
            "task": tasks.pop() if len(tasks) == 1 else None,
        }
        # One file for each phase, since phases of one task end on several processes at once.
        write_json(self.folder.checkpoints / "seconds" / f"{phase.name}.json", record)

    def _non_finite(self, phase: Phase, step: int, found: str, in_row: int = 0) -> NonFiniteLossError:
        classes = ", ".join(f"{c} ({self.strategy.setting.class_names[c]})" for c in phase.class_ids)
        path = latest_checkpoint(self.folder.checkpoints / phase.name)
        kept = "There is no checkpoint of this phase yet" if path is None else f"The last good checkpoint is {path}"
        row = f", after {in_row} such steps in a row that changed nothing" if in_row > 1 else ""
        return NonFiniteLossError(
            f"{found} at step {step + 1} of phase {phase.name!r}, class {classes}{row}. {kept}; finished classes "
            "are safe. Lower the learning rate or raise the warm-up of this phase; under fp16, try bf16. If it happens by "
            "chance, raise `max_nonfinite_steps` and resume."
        )


def phase_steps(settings: PhaseSettings, num_images: int, training: LoopArguments) -> int:
    """Return the optimizer steps of a phase with so many images."""
    # Number of batches in which every image is seen once, rounded up.
    per_epoch = -(-num_images // settings.images_per_batch)
    epochs, accumulated = settings.epochs, training.gradient_accumulation_steps
    by_epochs = None if epochs is None else math.ceil(epochs * per_epoch / accumulated)
    counts = (settings.train_steps, by_epochs, training.max_train_steps)
    return min(count for count in counts if count is not None)


def phase_images(phase: Phase, num_images: Mapping[int, int], training: LoopArguments) -> int:
    """Count the images that a phase will train on, each as often as it is seen; `num_images` has the number of each class's images."""
    count = sum(num_images.get(class_id, 0) for class_id in phase.class_ids)
    return phase_steps(phase.settings, count, training) * images_per_step(phase.settings, training)


def moving_average(
    parameters: Sequence[torch.nn.Parameter], settings: PhaseSettings, steps: int, *, foreach: bool
) -> EMAModel:
    """Return the moving average for a phase of so many steps, at its start; `foreach` updates all parameters at once."""
    decay, start = settings.ema_decay, int(settings.ema_start * steps)
    # With `min_decay` equal to the decay, diffusers has no warm-up, but starts averaging one step late.
    least, start = (0.0, start) if settings.ema_warmup else (decay, start - 1)
    return EMAModel(parameters, decay=decay, min_decay=least, update_after_step=start, foreach=foreach)


def images_per_step(settings: PhaseSettings, training: LoopArguments) -> int:
    """Return the number of images in one step of the optimizer."""
    return settings.batch_size * training.gradient_accumulation_steps


def learning_rate(settings: PhaseSettings, step: int, steps: int) -> float:
    """Return the learning rate of a step, from 0, of a phase of so many. It needs no state, so a resumed phase has the same.

    Source: arXiv 2510.02631, training recipe: warm-up, then constant [text], the shape of the warm-up [ours]. The decays after it are
    those of diffusers' schedulers of the same names.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return settings.learning_rate * decay[settings.lr_scheduler]


def phase_seconds(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Return the record of each finished phase of a run: `{phase: {seconds, steps, skipped_steps, ema_decay, losses, images, process,
    task}}`; the task counts from 0, and is None for a phase with images of several tasks."""
    return {path.stem: read_json(path) for path in sorted((folder.checkpoints / "seconds").glob("*.json"))}


def preparation_seconds(folder: RunFolder) -> dict[int, float]:
    """Return the seconds before the first phase of each task, such as for images to replay: `{task, from 0: seconds}`."""
    records = [read_json(path) for path in (folder.checkpoints / PREPARATION).glob("*.json")]
    return {record["task"]: record["seconds"] for record in records}


def per_task(phases: Mapping[str, Mapping[str, Any]], key: str, start: Sequence[float]) -> list[float]:
    """Add to `start` the recorded `key` of each task's phases; a phase with images of several tasks counts for the first."""
    sums = list(start)
    for record in phases.values():
        sums[int(record.get("task") or 0)] += record[key]
    return sums
