"""The loop, with strategies that show what it asks of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn

from funlora_hf.continual import time_limit
from funlora_hf.continual.batches import RealImages
from funlora_hf.continual.config import ContinualTrainingArguments
from funlora_hf.continual.learning import LR_SCHEDULERS
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategy import Phase, PhaseSettings, Strategy, Trainable
from funlora_hf.continual.time_limit import TimeLimit, TimeLimitReached
from funlora_hf.continual.trainer import (
    ContinualTrainer,
    NonFiniteLossError,
    learning_rate,
    phase_images,
    phase_seconds,
    phase_steps,
)
from funlora_hf.data.tasks import Task


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
TASKS = [Task(0, (0,)), Task(1, (1,)), Task(2, (2,))]


class Images:
    """One grey pixel a class, its value the class's own."""

    class_names = {0: "a", 1: "b", 2: "c"}  # noqa: RUF012

    def images(self, class_id):
        return torch.full((5, 1, 1, 1), 40 * class_id, dtype=torch.uint8)


class RunningSum(Strategy):
    """Keeps the sum of what the tasks have learned: a state that must neither be lost nor counted twice."""

    name = "running_sum"

    def __init__(self, folder):
        super().__init__(setting=None)
        self.folder = folder
        self.total = torch.zeros(())
        self.fail_at: str | None = None
        self.built: list[str] = []
        self.steps = 0

    def check(self):
        pass

    def phases(self, task):
        settings = PhaseSettings(4, None, 2, 0.1, 0, 0.5, 0.0)
        return [Phase(f"task_{task.index + 1}", task.class_ids, settings, independent=False)]

    def is_finished(self, phase):
        return (self.folder / phase.name).is_file()

    def build(self, phase):
        self.built.append(phase.name)
        torch.manual_seed(0)
        module = nn.Linear(1, 1)
        return Trainable(module, dict(module.named_parameters()))

    def training_step(self, phase, batch, module):
        losses = (module(batch.sample.flatten(1)) - batch.sample.flatten(1)).square().flatten()
        return losses

    def after_step(self, phase):
        self.steps += 1
        if phase.name == self.fail_at and self.steps % 4 == 3:
            raise KeyboardInterrupt

    def end_phase(self, phase, trainable):
        self.learned = sum(p.detach().sum() for p in trainable.parameters.values())
        (self.folder / phase.name).write_text("done")

    def end_task(self, task):
        self.total = self.total + self.learned

    @contextmanager
    def inference(self, class_ids):
        yield None

    def parameters_per_class(self):
        return {}

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]

    def memory_report(self):
        return {"persistent": 4, "transient": 0}


def train(
    strategy,
    path,
    resume=None,
    evaluator=None,
    checkpointing_steps=1,
    max_nonfinite_steps=0,
    accelerator=None,
    steps_between_reads=1,
    **trainer_arguments,
):
    training = ContinualTrainingArguments(
        resume_from_checkpoint=resume,
        checkpointing_steps=checkpointing_steps,
        max_nonfinite_steps=max_nonfinite_steps,
    )
    strategy.setting = SimpleNamespace(tasks=TASKS, training=training, class_names=Images.class_names)
    trainer = ContinualTrainer(
        strategy,
        RealImages(Images(), training, torch.device("cpu")),
        folder=RunFolder(path),
        accelerator=accelerator or Accelerator(cpu=True),
        listeners=[] if evaluator is None else [evaluator],
        **trainer_arguments,
    )
    trainer._read_every = steps_between_reads  # as on a GPU, if more than 1
    trainer.train()


@pytest.mark.parametrize("fail_at", ["task_1", "task_2", "task_3"])
def test_a_strategy_s_state_survives_a_restart(fail_at, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = RunningSum(tmp_path / "whole")
    train(whole, tmp_path / "whole")

    (tmp_path / "cut").mkdir()
    first = RunningSum(tmp_path / "cut")
    first.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        train(first, tmp_path / "cut")
    second = RunningSum(tmp_path / "cut")
    train(second, tmp_path / "cut", resume="latest")
    assert torch.equal(second.total, whole.total)
    assert second.built == ["task_1", "task_2", "task_3"][int(fail_at[-1]) - 1 :]
    # Checkpoints after every step: two steps were done, the third was not stored.
    assert second.steps == 12 - 4 * (int(fail_at[-1]) - 1) - 2


@pytest.mark.parametrize(("start", "warmup"), [(0, True), (2, True), (0, False), (2, False)])
def test_what_a_phase_leaves_is_the_moving_average(start, warmup, tmp_path):
    """As `PhaseSettings` defines it."""
    steps, decay = 8, 0.3

    class Averaged(RunningSum):
        def phases(self, task):
            settings = PhaseSettings(steps, None, 2, 0.1, 0, decay, start / steps, ema_warmup=warmup)
            return [Phase(f"task_{task.index + 1}", task.class_ids, settings, independent=False)]

        def build(self, phase):
            trainable = super().build(phase)
            self.module = trainable.module
            self.seen = [self.module.weight.item()]
            return trainable

        def after_step(self, phase):
            self.seen.append(self.module.weight.item())

        def end_phase(self, phase, trainable):
            super().end_phase(phase, trainable)
            average = self.seen[0]
            for step, weight in enumerate(self.seen[1:], 1):
                averaged = step - start - 1
                if warmup:
                    kept = min(decay, (1 + averaged) / (10 + averaged)) if averaged > 0 else 0.0
                else:
                    kept = decay if step > start else 0.0
                average = kept * average + (1 - kept) * weight
            assert self.module.weight.item() == pytest.approx(average, abs=1e-6)
            assert self.module.weight.item() != pytest.approx(self.seen[-1], abs=1e-4)

    train(Averaged(tmp_path), tmp_path)


def test_phases_come_before_the_evaluation_of_their_task(tmp_path):
    events = []

    class Recorder(RunningSum):
        def end_phase(self, phase, trainable):
            super().end_phase(phase, trainable)
            events.append(phase.name)

        def end_task(self, task):
            super().end_task(task)
            events.append(f"end {task.index}")

    class Evaluator:
        def end_task(self, task):
            events.append(f"judge {task.index}")

    train(Recorder(tmp_path), tmp_path, evaluator=Evaluator())
    assert events == [e for t in range(3) for e in (f"task_{t + 1}", f"end {t}", f"judge {t}")]
    assert not list((tmp_path / "checkpoints").glob("*/step_*"))


class Watched(torch.Tensor):
    """A tensor that tells when its entries become Python numbers, for which a GPU would be waited for."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            Watched.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class WatchedLoss(RunningSum):
    """Its loss is watched, and not finite at one step of the second task. A read of each outcome comes with each step only
    where losses are read at each step, too."""

    nan_at = None

    def training_step(self, phase, batch, module):
        losses = super().training_step(phase, batch, module)
        if phase.name == "task_2" and self.steps % 4 == self.nan_at:
            losses = losses * float("nan")
        return losses.as_subclass(Watched)


@pytest.mark.parametrize(
    ("steps_between_reads", "checkpointing_steps", "reads"), [(1, 100, 8), (3, 100, 2), (100, 100, 1), (100, 2, 2)]
)
def test_losses_are_read_no_more_often_than_asked(
    steps_between_reads, checkpointing_steps, reads, tmp_path, monkeypatch
):
    monkeypatch.setattr(Watched, "reads", 0)
    strategy, plain = WatchedLoss(tmp_path), RunningSum(tmp_path / "plain")
    plain.folder.mkdir()
    train(strategy, tmp_path, steps_between_reads=steps_between_reads, checkpointing_steps=checkpointing_steps)
    assert Watched.reads == 3 * reads
    train(plain, tmp_path / "plain", steps_between_reads=steps_between_reads)
    assert torch.equal(strategy.total, plain.total)


@pytest.mark.parametrize(
    ("steps_between_reads", "checkpointing_steps", "steps"), [(1, 100, 1), (3, 100, 2), (100, 100, 4), (100, 2, 2)]
)
def test_a_loss_that_is_read_late_names_its_step(steps_between_reads, checkpointing_steps, steps, tmp_path):
    strategy = WatchedLoss(tmp_path)
    strategy.nan_at = 1
    with pytest.raises(NonFiniteLossError, match=r"nan at step 2 of phase 'task_2', class 1 \(b\)"):
        train(strategy, tmp_path, steps_between_reads=steps_between_reads, checkpointing_steps=checkpointing_steps)
    assert strategy.steps == 4 + steps
    assert not list((tmp_path / "checkpoints").glob("task_2/step_*"))


class LosesSteps(RunningSum):
    """The loss of some steps of the second task, counted from 1 in every process, is not finite."""

    def __init__(self, folder, lost=()):
        super().__init__(folder)
        folder.mkdir(exist_ok=True)
        self.lost = lost

    def make_batch(self, phase, real):
        self.number = real.number + 1
        return real

    def training_step(self, phase, batch, module):
        losses = super().training_step(phase, batch, module)
        lost = phase.name == "task_2" and self.number in self.lost
        return losses * float("inf") if lost else losses

    def end_phase(self, phase, trainable):
        super().end_phase(phase, trainable)
        # Weight and bias go apart by the same steps, so that their sum says nothing.
        self.learned = trainable.parameters["weight"].detach().sum()


def test_lost_steps_that_are_read_late_are_counted_also_over_a_restart(tmp_path, caplog):
    whole, sound = LosesSteps(tmp_path / "whole", (2, 3)), LosesSteps(tmp_path / "sound")
    options = {"max_nonfinite_steps": 2, "steps_between_reads": 3}
    train(whole, tmp_path / "whole", **options)
    assert "2 of 4 steps of phase 'task_2' were skipped" in caplog.text
    train(sound, tmp_path / "sound", **options)
    assert not torch.equal(whole.total, sound.total)
    cut = LosesSteps(tmp_path / "cut", (2, 3))
    cut.fail_at = "task_2"
    with pytest.raises(KeyboardInterrupt):
        train(cut, tmp_path / "cut", **options)
    again = LosesSteps(tmp_path / "cut", (2, 3))
    train(again, tmp_path / "cut", resume="latest", **options)
    assert torch.equal(again.total, whole.total)
    records = [phase_seconds(RunFolder(tmp_path / folder)) for folder in ("whole", "cut")]
    for record in records:
        assert [record[f"task_{task}"]["skipped_steps"] for task in (1, 2, 3)] == [0, 2, 0]
    # Of the lost steps there is no loss; a resumed phase has those of before.
    losses = [[record[f"task_{task}"]["losses"] for task in (1, 2, 3)] for record in records]
    assert losses[0] == losses[1]
    assert [None in of_phase for of_phase in losses[0]] == [False, True, False]
    assert [len(of_phase) for of_phase in losses[0]] == [4, 4, 4]


@pytest.mark.parametrize(("images", "accumulated", "expected"), [(6, 1, 4), (7, 1, 6), (7, 2, 3), (30, 1, 8)])
def test_epochs_are_counted_in_whole_batches(images, accumulated, expected):
    settings = PhaseSettings(None, 2, 3, 0.1, 0, 0.5, 0.0)
    training = ContinualTrainingArguments(gradient_accumulation_steps=accumulated, max_train_steps=8)
    assert phase_steps(settings, images, training) == expected
    assert phase_steps(replace(settings, train_steps=2, epochs=None), images, training) == 2
    assert phase_steps(replace(settings, batch_size=6, pairs=True), images, training) == expected
    phase = Phase("p", (4, 5), settings, independent=True)
    assert phase_images(phase, {4: images - 1, 5: 1, 6: 1000}, training) == expected * 3 * accumulated


def test_a_row_of_lost_steps_stops_also_when_it_is_cut(tmp_path):
    cut = LosesSteps(tmp_path, (2, 3, 4))
    cut.fail_at = "task_2"
    with pytest.raises(KeyboardInterrupt):
        train(cut, tmp_path, max_nonfinite_steps=2)
    message = (
        r"inf at step 4 of phase 'task_2', class 1 \(b\), after 3 such steps in a row.*task_2/step_3.*"
        "Lower the learning rate.*raise `max_nonfinite_steps`"
    )
    with pytest.raises(NonFiniteLossError, match=message):
        train(LosesSteps(tmp_path, (2, 3, 4)), tmp_path, resume="latest", max_nonfinite_steps=2)
    # The same state is taken up where more are allowed.
    patient = LosesSteps(tmp_path, (2, 3, 4))
    train(patient, tmp_path, resume="latest", max_nonfinite_steps=3)
    assert phase_seconds(RunFolder(tmp_path))["task_2"]["skipped_steps"] == 3
    assert torch.isfinite(patient.total)


def test_a_phase_without_a_sound_step_is_not_finished(tmp_path):
    with pytest.raises(
        NonFiniteLossError, match=r"No step could be done.* at step 4 of phase 'task_2', class 1 \(b\)"
    ):
        train(LosesSteps(tmp_path, (1, 2, 3, 4)), tmp_path, max_nonfinite_steps=10)
    assert not (tmp_path / "task_2").exists()


class Overflows(RunningSum):
    """Gradients overflow as in float16."""

    def phases(self, task):
        return [replace(phase, settings=replace(phase.settings, train_steps=8)) for phase in super().phases(task)]

    def build(self, phase):
        trainable = super().build(phase)
        for parameter in trainable.parameters.values():
            parameter.register_hook(lambda gradient: torch.where(gradient.abs() > 65504, torch.inf, gradient))
        return trainable

    def after_step(self, phase):
        self.steps += 1
        if phase.name == self.fail_at and self.steps % 8 == 3:
            raise KeyboardInterrupt


def scaled():
    """What accelerate makes of fp16 on a GPU. The scale grows soon, and is another after a phase than before it."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    return accelerator


@pytest.mark.parametrize("fail_at", ["task_1", "task_2", "task_3"])
def test_the_scale_of_fp16_is_the_phase_s_own_and_survives_a_restart(fail_at, tmp_path):
    """Fused, as on a GPU: 100 steps between reads."""
    results, skipped = [], []
    for name, fails in (("whole", None), ("cut", fail_at)):
        (tmp_path / name).mkdir()
        first = Overflows(tmp_path / name)
        first.fail_at, accelerator = fails, scaled()
        with suppress(KeyboardInterrupt):
            train(first, tmp_path / name, steps_between_reads=100, accelerator=accelerator)
        results.append(first)
        skipped.append(accelerator.scaler.get_scale())
    assert skipped[0] < 2.0**20  # some steps were skipped to find it
    again = Overflows(tmp_path / "cut")
    train(again, tmp_path / "cut", resume="latest", steps_between_reads=100, accelerator=scaled())
    assert again.steps + results[1].steps - 1 == results[0].steps == 24
    assert torch.equal(again.total, results[0].total)


def test_a_phase_whose_scale_fp16_has_not_found_is_not_finished(tmp_path):
    """8 steps are too few for the limit of a row, which leaves room for 16 halvings."""
    strategy, accelerator = Overflows(tmp_path), scaled()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    with pytest.raises(
        NonFiniteLossError, match=r"No step could be done.* at step 8 of phase 'task_1', class 0 \(a\)"
    ):
        train(strategy, tmp_path, steps_between_reads=100, max_nonfinite_steps=10, accelerator=accelerator)
    assert not (tmp_path / "task_1").exists()


@pytest.mark.parametrize("ticks", [3, 5, 8])
def test_a_run_in_pieces_is_the_run_in_one(ticks, tmp_path, monkeypatch):
    """By a clock that only looking at it moves; every piece ends with all that it has done on disk."""
    (tmp_path / "whole").mkdir()
    whole = RunningSum(tmp_path / "whole")
    train(whole, tmp_path / "whole")
    clock = itertools.count()
    monkeypatch.setattr(time_limit, "monotonic", lambda: float(next(clock)))
    pieces, judged = [], []

    class Evaluator:
        def end_task(self, task):
            if task not in judged:
                judged.append(task)

    while len(judged) < 3 and len(pieces) < 20:
        resume = "latest" if pieces else None
        pieces.append(RunningSum(tmp_path))
        limit = TimeLimit(ticks / 60)
        with suppress(TimeLimitReached):
            train(pieces[-1], tmp_path, resume=resume, evaluator=Evaluator(), checkpointing_steps=100, limit=limit)
    assert len(pieces) > 2
    assert judged == TASKS
    assert sum(piece.steps for piece in pieces) == whole.steps
    assert torch.equal(pieces[-1].total, whole.total)


def test_the_moment_of_a_stop_is_said(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time_limit, "monotonic", lambda: float(next(clock)))
    with pytest.raises(TimeLimitReached, match=r"0.05 is over: stopped after step 2 of 4 of phase 'task_1'\."):
        train(RunningSum(tmp_path), tmp_path, limit=TimeLimit(3 / 60))
    assert {path.name for path in (tmp_path / "checkpoints" / "task_1").iterdir()} == {"step_1", "step_2"}
    with pytest.raises(TimeLimitReached, match="stopped before phase 'task_1'"):
        train(RunningSum(tmp_path), tmp_path, resume="latest", limit=TimeLimit(1e-9))


def test_all_processes_stop_when_one_has_to(tmp_path, monkeypatch):
    """This one has time left, and is told that another has not."""
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    asked = []

    def gather(self, flag):
        asked.append(flag.item())
        return torch.tensor([flag.item(), len(asked) >= 3])

    monkeypatch.setattr(Accelerator, "gather", gather)
    strategy = RunningSum(tmp_path)
    with pytest.raises(TimeLimitReached, match="stopped after step 2 of 4 of phase 'task_1'"):
        train(strategy, tmp_path, limit=TimeLimit(60))
    assert strategy.steps == 2
    assert asked == [0, 0, 0, 1]
    asked.clear()
    train(RunningSum(tmp_path), tmp_path, resume="latest")
    assert asked == []


def test_more_processes_than_images_in_a_batch_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match="phase 'task_1' has 2 images for 3 processes: give larger batches"):
        train(RunningSum(tmp_path), tmp_path)


def test_the_warm_up_is_linear_then_constant():
    settings = PhaseSettings(10, None, 2, 0.4, 4, 0.5, 0.0)
    assert [learning_rate(settings, step, 10) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 3])
def test_after_the_warm_up_the_rate_decays_as_in_diffusers(name, warmup):
    settings = PhaseSettings(10, None, 2, 0.4, warmup, 0.5, 0.0, lr_scheduler=name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
    of_diffusers = get_scheduler(
        f"{name}_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=10,
    )
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        of_diffusers.step()
    assert [learning_rate(settings, step, 10) for step in range(warmup, 10)] == pytest.approx(expected[warmup:])


class OfFactors(RunningSum):
    """Its bias has a rate of its own."""

    factors: Mapping[str, float] = {}
    decay = 0.0

    def build(self, phase):
        return replace(super().build(phase), factors=self.factors)

    def phases(self, task):
        return [replace(one, settings=replace(one.settings, weight_decay=self.decay)) for one in super().phases(task)]

    def end_phase(self, phase, trainable):
        super().end_phase(phase, trainable)
        self.found = {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_each_parameter_has_a_rate_of_its_own_and_the_decay_of_adamw(decay, tmp_path):
    strategy = OfFactors(tmp_path)
    strategy.factors, strategy.decay = {"bias": 5.0}, decay
    train(strategy, tmp_path)
    torch.manual_seed(0)
    module = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(
        [{"params": module.weight}, {"params": module.bias, "lr": 0.5}], lr=0.1, weight_decay=decay
    )
    average = [p.detach().clone() for p in module.parameters()]
    for step in range(4):
        x = torch.full((2, 1), 80 / 127.5 - 1)
        (module(x) - x).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        kept = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        average = [kept * a + (1 - kept) * p.detach() for a, p in zip(average, module.parameters(), strict=True)]
    for own, expected in zip(strategy.found.values(), average, strict=True):
        torch.testing.assert_close(own, expected)


def test_factors_of_one_change_nothing(tmp_path):
    """To the bit; and as without factors, a checkpoint has one group of the optimizer."""
    found = []
    for place, factors in (("none", {}), ("ones", {"weight": 1.0, "bias": 1.0})):
        strategy = OfFactors(tmp_path / place)
        strategy.factors = factors
        (tmp_path / place).mkdir()
        train(strategy, tmp_path / place)
        assert len(strategy.build(strategy.phases(TASKS[0])[0]).groups()) == 1
        found.append([strategy.total, *strategy.found.values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_phase_of_two_rates_goes_on_where_it_was_cut(tmp_path):
    found = []
    for place, cut in (("whole", False), ("cut", True)):
        strategy = OfFactors(tmp_path / place)
        strategy.factors, strategy.decay = {"weight": 0.25}, 0.1
        (tmp_path / place).mkdir()
        if cut:
            strategy.fail_at = "task_2"
            with pytest.raises(KeyboardInterrupt):
                train(strategy, tmp_path / place)
            strategy.fail_at = None
        train(strategy, tmp_path / place, resume="latest" if cut else None)
        found.append(strategy.total)
    assert torch.equal(*found)


@pytest.mark.parametrize(("warmup", "reached"), [(4, None), (5, "0.08"), (12, "0.033")])
def test_a_warm_up_that_is_longer_than_its_phase_is_said_once(warmup, reached, tmp_path, monkeypatch, caplog):
    """Each of the three phases has 4 steps at a rate of 0.1."""
    settings = PhaseSettings(4, None, 2, 0.1, warmup, 0.5, 0.0)
    monkeypatch.setattr(
        RunningSum, "phases", lambda self, task: [Phase(f"task_{task.index + 1}", task.class_ids, settings, False)]
    )
    train(RunningSum(tmp_path), tmp_path)
    said = [record.getMessage() for record in caplog.records if "warm-up" in record.getMessage()]
    text = f"phase task_1: its 4 steps end in the warm-up of {warmup}, in which the learning rate reaches {reached} instead of 0.1"
    assert said == ([] if reached is None else [text])


def test_the_moving_average_is_what_is_kept(tmp_path):
    """Against plain Adam and an average written out, with diffusers' schedule of the decay."""
    strategy = RunningSum(tmp_path)
    train(strategy, tmp_path)
    total = 0.0
    for task in TASKS:
        torch.manual_seed(0)
        module = nn.Linear(1, 1)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        average = [p.detach().clone() for p in module.parameters()]
        value = 40 * task.class_ids[0] / 127.5 - 1
        for step in range(4):
            x = torch.full((2, 1), value)
            (module(x) - x).square().mean().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
            average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, module.parameters(), strict=True)]
        total += sum(a.sum().item() for a in average)
    assert strategy.total.item() == pytest.approx(total, abs=1e-5)
