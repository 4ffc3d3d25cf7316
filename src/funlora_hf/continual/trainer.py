"""ContinualTrainer: runs the phases of a strategy, task after task, on one process or many.

Owns optimiser, backward, moving average, seeds, devices, checkpoints and progress.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..adapters.class_folder import adapter_name
from ..data.image_data import ImageClassificationData, Task
from ..utils.files import read_json, remove_folder, write_json
from ..utils.seeds import derive_seed
from .batches import PhaseBatches
from .checkpoint import TrainingState, latest_checkpoint, load_newest, save_checkpoint
from .compilation import compilation_errors
from .config import ContinualTrainingArguments
from .devices import default_steps_between_reads
from .guarded_steps import GuardedSteps
from .losses import PendingLosses, StepLoss
from .run_folder import RunFolder
from .skipped_steps import Outcome, SkippedSteps
from .strategies.funlora import FunLora
from .strategy import Phase, PhaseSettings, Strategy, Trainable
from .strategy_state import keep_memory_report, load_task_state, save_task_state
from .termination import Terminated, Termination
from .time_limit import TimeLimit, TimeLimitReached


logger = logging.getLogger(__name__)

# Folder of the seconds that belong to a task and to no phase.
PREPARATION = "preparation"


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite, and stayed so."""


class _Reason(IntEnum):
    """Why to stop; where processes have several reasons, the last counts for all of them."""

    NONE = 0
    TIME = 1
    SIGNAL = 2


class Evaluator(Protocol):
    """What the trainer tells of its progress."""

    def end_task(self, task: Task) -> None:
        """All results of a task are on disk; every process calls this."""


class ContinualTrainer:
    """
    Runs a strategy over tasks.

    Args:
        strategy ([`Strategy`]): what is trained, and how.
        data ([`ImageClassificationData`]): the real images.
        tasks (`list[Task]`): in order.
        training ([`ContinualTrainingArguments`]): how.
        folder ([`RunFolder`]): where; opened already.
        accelerator ([`Accelerator`]): on what.
        random_flip (`bool`): flip training images at random.
        evaluator ([`Evaluator`], *optional*): told after every task.
        limit ([`TimeLimit`], *optional*): when to stop; None: never.
        termination ([`Termination`], *optional*): whether SIGTERM has come; None: not listened to.
        steps_between_reads (`int`, *optional*):
            After how many steps losses are read from the device; None: every step on the CPU, seldom on a GPU, which
            would have to wait meanwhile.
    """

    def __init__(
        self,
        strategy: Strategy,
        data: ImageClassificationData,
        tasks: list[Task],
        *,
        training: ContinualTrainingArguments,
        folder: RunFolder,
        accelerator: Accelerator,
        random_flip: bool = False,
        evaluator: Evaluator | None = None,
        limit: TimeLimit | None = None,
        termination: Termination | None = None,
        steps_between_reads: int | None = None,
    ) -> None:
        self.strategy = strategy
        self.data = data
        self.tasks = tasks
        self.training = training
        self.folder = folder
        self.accelerator = accelerator
        self.random_flip = random_flip
        self.evaluator = evaluator
        self.limit = TimeLimit(None) if limit is None else limit
        self.termination = Termination() if termination is None else termination
        # Processes ask each other only if there may be something to say.
        self._asks = bool(self.limit) or termination is not None
        self._task_of = {class_id: task.index for task in tasks for class_id in task.class_ids}
        self._fresh_scale = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        self.steps_between_reads = steps_between_reads or default_steps_between_reads(accelerator.device)

    def train(self) -> None:
        """Run every phase that is not finished yet, and the evaluation after every task.

        Raises:
            NonFiniteLossError: names the class and the step, `max_nonfinite_steps` in a row behind the last sound one; the
                last checkpoint is kept.
            TimeLimitReached: on all processes, with a checkpoint where one was in the middle of a phase.
            Terminated: likewise, but without waiting for processes that have phases of their own and no signal.
            FileNotFoundError: the run's folder was deleted or moved meanwhile.
            WriteError: a file could not be written; what is finished is safe.
            ValueError: more processes than images in a batch that they share.
        """
        self.folder.check_there()
        for task in self.tasks:
            restored = self._restore_task(task)
            if not restored:
                self._learn_task(task)
            self.accelerator.wait_for_everyone()
            if self.evaluator is not None:
                # What an earlier run has trained is judged first of all, so that each run gets ahead.
                if not restored:
                    self._stop_if(self._agreed(self._reason()), f"before the evaluation of task {task.index + 1}")
                self.folder.check_there()
                self.evaluator.end_task(task)
                self.accelerator.wait_for_everyone()

    def update_class(self, class_id: int) -> None:
        """Train the adapter of one class again on the images it has now; no other file of the run changes.

        The picture of the class's samples goes, since it shows those of the adapter that was.

        Raises:
            ValueError: the strategy has no adapters, or the class has none.
            TimeLimitReached: as `train`.
        """
        strategy = self.strategy
        if not isinstance(strategy, FunLora):
            raise ValueError(f"`update_class` needs a strategy with adapters, and `strategy` is {strategy.name!r}.")
        if not (strategy.adapters_dir / adapter_name(class_id)).is_dir():
            known = sorted(path.name for path in strategy.adapters_dir.iterdir())
            raise ValueError(
                f"`update_class` is {class_id}, expected a class with an adapter of its own: {', '.join(known)}. The "
                "classes of the base are frozen."
            )
        phase = Phase(
            f"update_{adapter_name(class_id)}",
            (class_id,),
            PhaseSettings.of(self.training, "adapter"),
            independent=True,
        )
        mine = [phase] if self.accelerator.is_main_process else []
        self._run_in_time(mine, lambda phase: strategy.build_update(class_id))
        if mine:
            # It shows what the class was.
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
        # What is prepared may lie on disk, where the phases of other processes find it.
        self.accelerator.wait_for_everyone()
        self._run_phases(phases)
        self.accelerator.wait_for_everyone()
        self.strategy.end_task(task)
        if self.accelerator.is_main_process:
            keep_memory_report(self.folder, task, self.strategy)
            # Last, since a task that has this file is not begun again.
            save_task_state(self._task_state(task), self.strategy)

    def _check_access(self, task: Task, phases: list[Phase]) -> None:
        """Real images of other tasks are only for a strategy that says that it needs them."""
        if "all_tasks" in self.strategy.requires:
            return
        for phase in phases:
            others = sorted(set(phase.class_ids) - set(task.class_ids))
            if others:
                raise ValueError(
                    f"Phase {phase.name!r} of `strategy` {self.strategy.name!r} asks for real images of classes {others}, "
                    f"which task {task.index + 1} does not have. A strategy that must see them says so: requires = "
                    'frozenset({"all_tasks"}).'
                )

    def _restore_task(self, task: Task) -> bool:
        """Take up the strategy's state behind a task that an earlier run has finished; False if none has."""
        path = self._task_state(task)
        finished = path.is_file() and all(self.strategy.is_finished(phase) for phase in self.strategy.phases(task))
        if finished:
            load_task_state(path, self.strategy)
        return finished

    def _task_state(self, task: Task) -> Path:
        return self.folder.checkpoints / "strategy" / f"task_{task.index + 1}.safetensors"

    def _record_preparation(self, task: Task, seconds: float) -> None:
        # A task that is begun again after a restart adds to what it took before.
        path = self.folder.checkpoints / PREPARATION / f"task_{task.index + 1}.json"
        before = read_json(path)["seconds"] if path.is_file() else 0.0
        write_json(path, {"seconds": before + seconds, "task": task.index})

    def _run_phases(self, phases: list[Phase]) -> None:
        shared = [phase for phase in phases if not phase.independent]
        independent = [phase for phase in phases if phase.independent]
        # The share of a process depends on the list alone, not on what is finished, so a resume divides work alike.
        mine = independent[self.accelerator.process_index :: self.accelerator.num_processes]
        for phase in shared:
            if phase.settings.batch_size < self.accelerator.num_processes:
                raise ValueError(
                    f"The batch of phase {phase.name!r} has {phase.settings.batch_size} images for "
                    f"{self.accelerator.num_processes} processes: raise `base_batch_size`, or start fewer processes."
                )
        finished = [phase for phase in [*shared, *mine] if self.strategy.is_finished(phase)]
        for phase in finished:
            self._drop_checkpoints(phase)
        self._run_in_time([phase for phase in [*shared, *mine] if phase not in finished], self.strategy.build)

    def _run_in_time(self, phases: list[Phase], build: Callable[[Phase], Trainable]) -> None:
        """Run this process's phases; at the end, all processes stop if the time of one of them was over."""
        reached: TimeLimitReached | None = None
        try:
            for phase in phases:
                self._stop_if(self._due(phase), f"before phase {phase.name!r}")
                self._run_phase(phase, build)
                if not phase.independent:
                    self.accelerator.wait_for_everyone()
        except TimeLimitReached as error:
            reached = error
        reason = self._agreed(_Reason.NONE if reached is None else _Reason.TIME)
        if reached is not None:
            raise reached
        self._stop_if(reason, "since another process had to stop")

    def _reason(self) -> _Reason:
        """Why this process has to stop now."""
        if self.termination.requested:
            return _Reason.SIGNAL
        return _Reason.TIME if self.limit.is_over else _Reason.NONE

    def _due(self, phase: Phase) -> _Reason:
        """Why to stop now; in a phase that processes share, one reason for all of them."""
        return self._reason() if phase.independent else self._agreed(self._reason())

    def _agreed(self, reason: _Reason) -> _Reason:
        """The gravest reason of any process; all of them call this."""
        if self.accelerator.num_processes == 1 or not self._asks:
            return reason
        reasons = self.accelerator.gather(torch.tensor([int(reason)], device=self.accelerator.device))
        return _Reason(int(reasons.max()))

    def _stop_if(self, reason: _Reason, where: str) -> None:
        if reason is _Reason.SIGNAL:
            raise Terminated(where)
        if reason is _Reason.TIME:
            raise self.limit.reached(where)

    def _run_phase(self, phase: Phase, build: Callable[[Phase], Trainable]) -> None:
        started = time.perf_counter()
        batches = PhaseBatches(
            self.data,
            phase,
            seed=self.training.seed,
            timestep_density=self.training.timestep_density,
            random_flip=self.random_flip,
            device=self.accelerator.device,
            memory_format=torch.channels_last if self.training.channels_last else torch.preserve_format,
        )
        torch.manual_seed(derive_seed(self.training.seed, phase.name, "start"))
        trainable = build(phase)
        try:
            with self.termination.deferred():
                with compilation_errors():
                    steps, skipped = self._train(phase, trainable, batches)
                if self._writes(phase):
                    self.folder.check_there()
                    # First, since a phase that has ended is not run again.
                    self._record_seconds(phase, steps, skipped, time.perf_counter() - started)
                    self.strategy.end_phase(phase, trainable)
        finally:
            self.strategy.release_phase(phase, trainable)
            self.accelerator.free_memory()
        self._drop_checkpoints(phase)

    def _train(self, phase: Phase, trainable: Trainable, batches: PhaseBatches) -> tuple[int, int]:
        """Returns the steps of the phase, and how many of them were skipped."""
        accelerator, settings = self.accelerator, phase.settings
        steps = self._steps(phase, batches)
        parameters = list(trainable.parameters.values())
        state = self._training_state(trainable, settings, steps)
        done = self._resume(phase, state)
        guard = GuardedSteps(
            state, accelerator, shared=not phase.independent, max_grad_norm=self.training.max_grad_norm
        )
        module = trainable.module if phase.independent else accelerator.prepare_model(trainable.module)
        losses = PendingLosses(self.steps_between_reads)

        with tqdm(total=steps, initial=done, desc=phase.name, **self._bar_options(phase)) as bar:
            for step in range(done, steps):
                # Processes that share the phase ask each other, for which they wait anyway where losses are read.
                asks = phase.independent or accelerator.num_processes == 1 or not losses
                if step > done and asks and (reason := self._due(phase)):
                    self._read(phase, losses, state.skipped, bar)
                    self._checkpoint(phase, step, state)
                    self._stop_if(reason, f"after step {step} of {steps} of phase {phase.name!r}")
                for group in state.optimizer.param_groups:
                    group["lr"] = learning_rate(settings, step)
                losses.add(step, *self._step(phase, module, batches, step, guard))
                if losses.due:
                    self._read(phase, losses, state.skipped, bar)
                self.strategy.after_step(phase)
                bar.update()
                if (step + 1) % self.training.checkpointing_steps == 0 and step + 1 < steps:
                    self._read(phase, losses, state.skipped, bar)
                    self._checkpoint(phase, step + 1, state)
            self._read(phase, losses, state.skipped, bar)
        if not phase.independent:
            accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        state.ema.copy_to(parameters)
        self._check_finite(phase, steps, parameters)
        self._report_skipped(phase, steps, state.skipped.total)
        return steps, state.skipped.total

    def _training_state(self, trainable: Trainable, settings: PhaseSettings, steps: int) -> TrainingState:
        parameters = list(trainable.parameters.values())
        # A GPU takes one kernel for all parameters; on a CPU, torch chooses. Where losses are read late, so is what could not
        # be done, which a fused optimiser need not know.
        on_gpu = self.accelerator.device.type == "cuda"
        fused = True if on_gpu or self.steps_between_reads > 1 else None
        optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, fused=fused)
        start = int(settings.ema_start * steps)
        ema = EMAModel(parameters, decay=settings.ema_decay, update_after_step=start, foreach=on_gpu)
        scaler = self.accelerator.scaler
        if scaler is not None:
            # accelerate has one for all phases; what a class learns must not depend on those before it in the process.
            scaler.load_state_dict(self._fresh_scale)
        return TrainingState(trainable.parameters, optimizer, ema, trainable.buffers, scaler=scaler)

    def _step(
        self, phase: Phase, module: Any, batches: PhaseBatches, step: int, guard: GuardedSteps
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """One optimiser step; returns the losses of its `gradient_accumulation_steps` batches on this process, and its
        outcome."""
        accelerator = self.accelerator
        shares = 1 if phase.independent else accelerator.num_processes
        share = 0 if phase.independent else accelerator.process_index
        accumulated = self.training.gradient_accumulation_steps
        parts, outcome = [], torch.tensor(0)
        guard.begin()
        for part in range(accumulated):
            number = step * accumulated + part
            # Randomness of a strategy's batch and of dropout: of the step, and different in each share of a batch.
            torch.manual_seed(derive_seed(self.training.seed, phase.name, "step", number, share))
            batch = self.strategy.make_batch(phase, batches.batch(number, share=share, num_shares=shares))
            with accelerator.accumulate(module):
                with accelerator.autocast():
                    output = self.strategy.training_step(phase, batch, module)
                # DDP averages over processes: weighed so, the result is the mean over the whole batch, also where it
                # does not split evenly.
                loss = output.losses.sum() * shares / phase.settings.batch_size
                parts.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    outcome = guard.end(parts)
        return parts, outcome

    def _read(self, phase: Phase, losses: PendingLosses, skipped: SkippedSteps, bar: tqdm) -> None:
        """Report the losses that wait on the device, and count the steps that were skipped."""
        for loss in losses.read():
            self._count(phase, loss, skipped)
            bar.set_postfix(loss=f"{loss.mean:.3f}", refresh=False)
            rate = learning_rate(phase.settings, loss.step)
            self.accelerator.log({f"{phase.name}/loss": loss.mean, f"{phase.name}/lr": rate}, step=loss.step)

    def _count(self, phase: Phase, loss: StepLoss, skipped: SkippedSteps) -> None:
        skipped.add(loss.outcome, scaled=self.accelerator.scaler is not None)
        if not skipped.exceed(self.training.max_nonfinite_steps):
            return
        value = next((value for value in loss.parts if not math.isfinite(value)), math.nan)
        found = "The gradient is not finite" if loss.outcome is Outcome.NO_GRADIENT else f"The loss is {value}"
        raise NonFiniteLossError(self._non_finite_message(phase, loss.step, found, skipped.in_row))

    def _report_skipped(self, phase: Phase, steps: int, skipped: int) -> None:
        if skipped == steps:
            found = "No step could be done, since loss or gradient is not finite,"
            raise NonFiniteLossError(self._non_finite_message(phase, steps - 1, found, skipped))
        if skipped:
            # fp16 cannot do without.
            logger.log(
                logging.WARNING if self.accelerator.scaler is None else logging.INFO,
                "%d of %d steps of phase %r were skipped, since loss or gradient was not finite.",
                skipped,
                steps,
                phase.name,
            )

    def _steps(self, phase: Phase, batches: PhaseBatches) -> int:
        settings = phase.settings
        steps = settings.train_steps
        if steps is None:
            steps = math.ceil(settings.epochs * batches.batches_per_epoch / self.training.gradient_accumulation_steps)
        cap = self.training.max_train_steps
        return steps if cap is None else min(steps, cap)

    def _resume(self, phase: Phase, state: TrainingState) -> int:
        if self.training.resume_from_checkpoint is None:
            return 0
        return load_newest(self.folder.checkpoints / phase.name, state)

    def _checkpoint(self, phase: Phase, step: int, state: TrainingState) -> None:
        self._check_finite(phase, step, list(state.parameters.values()))
        if self._writes(phase):
            self.folder.check_there()
            limit = self.training.checkpoints_total_limit
            save_checkpoint(self.folder.checkpoints / phase.name, step, state, total_limit=limit)

    def _drop_checkpoints(self, phase: Phase) -> None:
        if self._writes(phase):
            remove_folder(self.folder.checkpoints / phase.name)

    def _writes(self, phase: Phase) -> bool:
        """Whether this process writes the files of a phase: its own phase, or one that all share and it leads."""
        return phase.independent or self.accelerator.is_main_process

    def _check_finite(self, phase: Phase, step: int, parameters: list[torch.Tensor]) -> None:
        # A step that could be done may still end in overflow, which nothing takes back.
        if not torch.stack([torch.isfinite(parameter).all() for parameter in parameters]).all():
            raise NonFiniteLossError(self._non_finite_message(phase, step - 1, "A parameter is not finite"))

    def _record_seconds(self, phase: Phase, steps: int, skipped: int, seconds: float) -> None:
        # One file a phase: phases of one task end on several processes at once.
        images = steps * phase.settings.batch_size * self.training.gradient_accumulation_steps
        record = {"seconds": seconds, "steps": steps, "skipped_steps": skipped, "images": images}
        record["process"] = self.accelerator.process_index
        tasks = {self._task_of.get(class_id) for class_id in phase.class_ids}
        record["task"] = tasks.pop() if len(tasks) == 1 else None
        if not phase.name.startswith("update_"):
            write_json(self.folder.checkpoints / "seconds" / f"{phase.name}.json", record)

    def _non_finite_message(self, phase: Phase, step: int, found: str, in_row: int = 0) -> str:
        classes = ", ".join(f"{c} ({self.data.class_names[c]})" for c in phase.class_ids)
        path = latest_checkpoint(self.folder.checkpoints / phase.name)
        kept = "There is no checkpoint of this phase yet" if path is None else f"The last good checkpoint is {path}"
        row = f", after {in_row} such steps in a row that changed nothing" if in_row > 1 else ""
        return (
            f"{found} at step {step + 1} of phase {phase.name!r}, class {classes}{row}. {kept}; finished classes "
            "are safe. Lower the learning rate or raise the warm-up of this phase; under fp16, try bf16. Where it comes by "
            "chance, raise `max_nonfinite_steps` and resume."
        )

    def _bar_options(self, phase: Phase) -> dict[str, Any]:
        # Each process shows its own independent phases on a line of its own.
        return {
            "disable": not self._writes(phase),
            "position": self.accelerator.process_index,
            "leave": False,
            "mininterval": 1.0,
        }


def learning_rate(settings: PhaseSettings, step: int) -> float:
    """Linear warm-up, then constant. A function of the step alone, so that a resumed phase needs no state for it.

    Args:
        settings: of the phase.
        step: from 0.

    Source: arXiv 2510.02631, training recipe: warm-up [text], its shape [ours].
    """
    return settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))


def phase_seconds(folder: RunFolder) -> dict[str, dict[str, float]]:
    """What each finished phase of a run took: `{phase: {seconds, steps, skipped_steps, images, process, task}}`; the task counts from 0, and
    is None for a phase of several tasks' images."""
    return {path.stem: read_json(path) for path in sorted((folder.checkpoints / "seconds").glob("*.json"))}


def preparation_seconds(folder: RunFolder) -> dict[int, float]:
    """What was spent before the first phase of each task, such as on images to replay: `{task, from 0: seconds}`."""
    records = [read_json(path) for path in (folder.checkpoints / PREPARATION).glob("*.json")]
    return {record["task"]: record["seconds"] for record in records}
