"""Strategies on classes that nobody drew, with a U-Net whose step takes milliseconds: what tests of all of them share."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import TINY_UNET

from funlora_hf.continual.batches import RealImages
from funlora_hf.continual.config import ContinualTrainingArguments, ModelArguments
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategies.registry import strategy_class
from funlora_hf.continual.strategy import Setting, Strategy
from funlora_hf.continual.trainer import ContinualTrainer
from funlora_hf.data.tasks import Task
from funlora_hf.sampling.drawing import draw_samples


TASKS = (Task(0, (5, 1)), Task(1, (0, 7)), Task(2, (3,)))
NAMES = {class_id: f"class {class_id}" for task in TASKS for class_id in task.class_ids}
OPTIONS = {
    "l2": {"penalty": 1.0},
    "ewc": {"fisher_batches": 3, "penalty": 10.0},
    "replay": {"num_inference_steps": 2, "classifier_train_steps": 3, "classifier_batch_size": 6},
    "ddgr": {"num_inference_steps": 2, "classifier_train_steps": 3, "classifier_batch_size": 6},
    "guide": {"num_inference_steps": 2, "classifier_train_steps": 3, "classifier_batch_size": 6, "refreshes": 2},
    "jdcl": {"num_inference_steps": 2, "head_hidden": 16},
    "diffclass": {"num_inference_steps": 2, "classifier_train_steps": 3, "classifier_batch_size": 6},
}
# Of strategies that have one.
RANKS = {
    name: {"rank": 2}
    for name in (
        *("funlora", "naive_lora", "merge_init", "merge_orthogonal", "magmax", "inc_lora", "o_lora", "clora"),
        "diffclass",
    )
}


class Drawn:
    """Images of a class: noise around its own level of grey. Reading a class of another task than `task` is an error."""

    class_names = NAMES

    def __init__(self, count: int = 5) -> None:
        self.per_class = count
        self.task: Task | None = None
        self.read: list[int] = []

    def images(self, class_id: int) -> torch.Tensor:
        if self.task is not None and class_id not in self.task.class_ids:
            raise AssertionError(f"class {class_id} is read in task {self.task.index + 1}")
        self.read.append(class_id)
        generator = torch.Generator().manual_seed(class_id)
        noise = torch.randint(0, 60, (self.per_class, 1, 8, 8), generator=generator)
        return (noise + 25 * class_id).to(torch.uint8)


def make_strategy(name: str, folder: Path, *, tasks=TASKS, data=None, model=None, **training) -> Strategy:
    """A strategy for a run in `folder`; keyword arguments are those of `ContinualTrainingArguments`."""
    training = {
        "base_train_steps": 6,
        "base_batch_size": 4,
        "adapter_train_steps": 4,
        "adapter_batch_size": 4,
        "checkpointing_steps": 100,
        "strategy_options": OPTIONS.get(name),
        "output_dir": str(folder),
        **training,
    }
    count = (data or Drawn()).per_class
    strategy_cls = strategy_class(name, training["strategy_options"])
    model = ModelArguments(unet_config=dict(TINY_UNET), **{**RANKS.get(name, {}), **(model or {})})
    setting = Setting(
        output_dir=folder,
        base_dir=folder / "base",
        base_source=str(folder / "base" / "unet"),
        has_base=False,
        class_names=NAMES,
        tasks=tuple(tasks),
        model=model,
        image_shape=strategy_cls.image_shape(model, strategy_cls.make_options(training["strategy_options"] or {})),
        training=ContinualTrainingArguments(strategy=name, **training),
        device=torch.device("cpu"),
        num_images=dict.fromkeys(NAMES, count),
    )
    strategy = strategy_cls(setting)
    strategy.check()
    return strategy


def learn(strategy: Strategy, *, data=None, evaluator=None) -> Strategy:
    """Run a strategy to its end, or to an exception."""
    AcceleratorState._reset_state(reset_partial_state=True)
    training = strategy.setting.training
    trainer = ContinualTrainer(
        strategy,
        RealImages(data or Drawn(), training, torch.device("cpu")),
        folder=RunFolder(strategy.setting.output_dir),
        accelerator=Accelerator(cpu=True, gradient_accumulation_steps=training.gradient_accumulation_steps),
        listeners=[] if evaluator is None else [evaluator],
    )
    trainer.train()
    return strategy


def stop_at(strategy: Strategy, phase_name: str, step: int) -> None:
    """Have a strategy interrupt the run behind a step, from 1, of a phase."""
    steps = dict.fromkeys([phase_name], 0)
    after = strategy.after_step

    def after_step(phase):
        after(phase)
        if phase.name == phase_name:
            steps[phase_name] += 1
            if steps[phase_name] == step:
                raise KeyboardInterrupt

    strategy.after_step = after_step


def drawn_from(pipe, class_id):
    return draw_samples(
        pipe, class_id, 3, purpose="test", seed=0, batch_size=3, solver="euler", num_inference_steps=2
    ).images


class Drawing:
    """Draws images of each class seen after each task."""

    def __init__(self, strategy) -> None:
        self.strategy, self.drawn = strategy, []

    def end_task(self, task):
        with self.strategy.inference(self.strategy.setting.seen(task)) as pipe:
            self.drawn.append({c: drawn_from(pipe, c) for c in self.strategy.setting.seen(task)})
