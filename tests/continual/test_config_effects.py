"""Each field of each argument class: one value that is refused by the field's name, and two that do not come to the same.

What the second pair changes is seen in a run that stops before its first step, in a tiny training, or in an adapter.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import accelerate.tracking
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from peft import PeftConfig, get_peft_model
from PIL import Image
from runs import TINY_UNET, make_tiny_unet, short_run, write_adapters
from strategies import NAMES, OPTIONS, Drawn, learn

from funlora_hf import BaseMismatchError, FunLoraConfig, FunLoraPipeline, base_fingerprints
from funlora_hf.adapters.base_fingerprint import FingerprintCheck
from funlora_hf.adapters.class_folder import class_of
from funlora_hf.baselines import ConvLoraConfig, ScaleShiftConfig
from funlora_hf.cards.model_cards import adapter_card
from funlora_hf.classifier import ClassifierConfig, train_classifier
from funlora_hf.continual import base as base_module
from funlora_hf.continual import publishing, run_context
from funlora_hf.continual import trainer as trainer_module
from funlora_hf.continual.base import BASE_PHASE
from funlora_hf.continual.config import (
    ContinualTrainingArguments,
    DataArguments,
    EvaluationArguments,
    ModelArguments,
)
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategies import generated_images
from funlora_hf.continual.strategies.funlora import FunLora
from funlora_hf.continual.strategies.registry import STRATEGIES
from funlora_hf.continual.strategy import Batch, Phase, Setting, Strategy, Trainable
from funlora_hf.continual.trainer import ContinualTrainer, NonFiniteLossError
from funlora_hf.data import open_dataset
from funlora_hf.data.tasks import Task
from funlora_hf.evaluation import evaluator as evaluator_module
from funlora_hf.evaluation.report import joint_average_accuracies
from funlora_hf.flow_matching import flow_matching_loss, interpolate, velocity_target
from funlora_hf.run import RunArguments, run
from funlora_hf.sampling.drawing import Samples
from funlora_hf.utils.files import write_json


TASKS = (Task(0, (5, 1)), Task(1, (0,)))
ATTENTION = {**TINY_UNET, "down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}


class Case(NamedTuple):
    """
    Args:
        bad: refused, naming the field.
        pair: two values.
        seen: (bench, arguments with one of them) -> what it comes to.
        beside: arguments that the pair needs.
    """

    bad: Any
    pair: tuple[Any, Any]
    seen: Callable[[Bench, dict[str, Any]], Any]
    beside: dict[str, Any] = {}  # noqa: RUF012 - a tuple's default


LEARNED: dict[str, dict[str, list[float]]] = {}


class _Begun(Exception):
    """A run has come to its first step."""


class Small(FunLora):
    """FunLoRA's phases, in each of which one convolution is trained."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.found: dict[str, list[float]] = {}

    def is_finished(self, phase: Phase) -> bool:
        return phase.name in self.found

    def build(self, phase: Phase) -> Trainable:
        module = torch.nn.Conv2d(1, 1, 3, padding=1)
        return Trainable(module, dict(module.named_parameters()))

    def training_step(self, phase: Phase, batch: Batch, module: torch.nn.Module) -> torch.Tensor:
        output = module(interpolate(batch.sample, batch.noise, batch.sigma))
        target = velocity_target(batch.sample, batch.noise) if batch.target is None else batch.target
        return flow_matching_loss(output, target)

    def end_phase(self, phase: Phase, trainable: Trainable) -> None:
        self.found[phase.name] = trainable.module.weight.flatten().tolist()

    def release_phase(self, phase: Phase, trainable: Trainable) -> None:
        pass

    def memory_report(self) -> dict[str, int]:
        return {"persistent": 0, "per_class": 0, "transient": 0}


class Bench:
    """Begins runs and trains, each in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        self._folders = (folder / str(number) for number in itertools.count())
        monkeypatch.setattr(open_dataset, "load_dataset", dataset)

    def begin(self, **arguments) -> ContinualTrainer | Exception:
        """The trainer of a run that was stopped before it trained; or the error by which it did not begin."""
        AcceleratorState._reset_state(reset_partial_state=True)
        found = []

        def begun(self, *class_id):
            found.append(self)
            self.asked = class_id
            raise _Begun

        self.patch.setattr(ContinualTrainer, "train", begun)
        self.patch.setattr(ContinualTrainer, "update_class", begun)
        given = {"dataset_name": "user/one", "image_column": "image", "classes_per_task": 2, **arguments}
        given = {"output_dir": str(next(self._folders)), **given}
        try:
            run(short_run(**given))
        except _Begun:
            return found[0]
        except FileExistsError as error:
            return error
        raise AssertionError("the run has not begun")

    def strategy(self, name: str, **training) -> Strategy:
        """A strategy of a run with attention, of two classes and one more, which is not trained."""
        model = training.pop("model", {})
        model = {"unet_config": ATTENTION, **model}
        folder = next(self._folders)
        given = {"output_dir": str(folder), "strategy_options": OPTIONS.get(name), **training}
        setting = Setting(
            output_dir=folder,
            base_dir=folder / "base",
            base_source="./base",
            has_base=False,
            class_names=NAMES,
            tasks=TASKS,
            model=ModelArguments(**model),
            image_shape=(1, 8),
            training=ContinualTrainingArguments(strategy=name, **given),
            device=torch.device("cpu"),
            num_images=dict.fromkeys(NAMES, 5),
        )
        return {**STRATEGIES, "funlora": Small}[name](setting)

    def learn(self, strategy: Strategy | None = None, **training) -> Small:
        """Train the small strategy: 4 steps of the base, 3 of a class."""
        few = {"base_train_steps": 4, "adapter_train_steps": 3, "base_batch_size": 4, "adapter_batch_size": 4}
        training = {**few, "base_warmup_steps": 0, "adapter_warmup_steps": 0, **training}
        return learn(strategy or self.strategy("funlora", **training))

    def learned(self, **training) -> dict[str, list[float]]:
        """What it has learned, by phase."""
        key = repr(training)
        if key not in LEARNED:
            LEARNED[key] = self.learn(**training).found
        return LEARNED[key]


def dataset(path: str, name: str | None = None, revision: str | None = None) -> DatasetDict:
    """In place of `datasets.load_dataset`: three classes, images that depend on all arguments."""
    seed = int.from_bytes(hashlib.sha256(repr((path, name, revision)).encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)

    def images(count):
        noise = torch.randint(0, 256, (count, 8, 8), generator=generator, dtype=torch.uint8)
        return [Image.fromarray(image.numpy()) for image in noise]

    splits = {}
    for split, count in (("train", 12), ("test", 6), ("validation", 9)):
        labels = [row % 3 for row in range(count)]
        columns = {"image": images(count), "picture": images(count), "label": labels, "kind": [7 + n for n in labels]}
        splits[split] = Dataset.from_dict(columns, features=FEATURES)
    return DatasetDict(splits)


FEATURES = Features(
    {
        "image": ImageFeature(),
        "picture": ImageFeature(),
        "label": ClassLabel(names=["a", "b", "c"]),
        "kind": Value("int64"),
    }
)


def begun(read: Callable[[ContinualTrainer], Any]) -> Callable[[Bench, dict[str, Any]], Any]:
    """What is to be read of the trainer of a run that begins."""

    def seen(bench: Bench, given: dict[str, Any]) -> Any:
        return read(bench.begin(**given))

    return seen


images = begun(lambda trainer: trainer.batches.data.digests())
tasks = begun(lambda trainer: trainer.tasks)
config = begun(lambda trainer: trainer.strategy.adapter_config(0).to_dict())


def trained(bench: Bench, given: dict[str, Any]) -> Any:
    return bench.learned(**given)


def base_alone(bench: Bench, given: dict[str, Any]) -> Any:
    """The base's weights; those of the class, which is trained by itself, must not change."""
    found = bench.learned(**given)
    assert found["class_0"] == bench.learned()["class_0"]
    return found[BASE_PHASE]


def class_alone(bench: Bench, given: dict[str, Any]) -> Any:
    """The class's weights; those of the base must not change."""
    found = bench.learned(**given)
    assert found[BASE_PHASE] == bench.learned()[BASE_PHASE]
    return found["class_0"]


def existing_base(bench: Bench, given: dict[str, Any]) -> Any:
    names = {0: "a", 1: "b"}
    pipe = FunLoraPipeline(make_tiny_unet(), FlowMatchEulerDiscreteScheduler(), class_ids=[0, 1], id2label=names)
    pipe.save_pretrained(bench.folder / "generator")
    asked = []

    def fetch(name, contents, *, revision):
        asked.append((name, revision))
        return bench.folder / "generator"

    bench.patch.setattr("funlora_hf.continual.base.fetch", fetch)
    trainer = bench.begin(**given, unet_config={**TINY_UNET, "dropout": 0.0})
    return asked, trainer.strategy.setting.has_base, trainer.strategy.adapter_config(2).revision


def placed(bench: Bench, given: dict[str, Any]) -> Any:
    bench.patch.chdir(bench.folder)
    bench.begin(**given)
    return [path.name for path in bench.folder.iterdir()]


def run_in_folder(bench: Bench, given: dict[str, Any]) -> Any:
    """Of a run that began there, the base is left."""
    out = bench.folder / "out"
    if not out.exists():
        bench.begin(output_dir=str(out))
    (out / "base").mkdir(exist_ok=True)
    trainer = bench.begin(**given, output_dir=str(out))
    return type(trainer), (out / "base").exists()


def built(bench: Bench, given: dict[str, Any]) -> Any:
    compiled = []
    bench.patch.setattr(base_module, "compile_blocks", compiled.append)
    unet = base_module.trainable_unet(bench.strategy("funlora", **given).setting, 2).module
    return len(compiled), unet.conv_out.weight.is_contiguous()


def factors(bench: Bench, given: dict[str, Any]) -> Any:
    strategy = FunLora(bench.strategy("funlora", **given).setting)
    base, later = (strategy.phases(task)[0] for task in strategy.setting.tasks[:2])
    strategy.end_phase(base, strategy.build(base))
    return [group["factor"] for group in strategy.build(later).groups()]


def started(bench: Bench, given: dict[str, Any]) -> Any:
    """Where the class of a third task starts, beside an adapter of the second."""
    setting = bench.strategy("funlora", **given).setting
    strategy = FunLora(replace(setting, tasks=(*TASKS, Task(2, (7,)))))
    pipe = FunLoraPipeline(make_tiny_unet(), FlowMatchEulerDiscreteScheduler())
    write_adapters(pipe, setting.output_dir, classes=TASKS[1].class_ids)
    return [parameter.tolist() for parameter in strategy.build(strategy.phases(Task(2, (7,)))[0]).parameters.values()]


def deterministic(bench: Bench, given: dict[str, Any]) -> Any:
    asked = []
    bench.patch.setattr(run_context, "deterministic_kernels", lambda device, wanted: nullcontext(asked.append(wanted)))
    bench.begin(**given)
    return asked


def skipped(bench: Bench, given: dict[str, Any]) -> Any:
    strategy = bench.strategy("funlora", **given)
    strategy.training_step = lambda phase, batch, module: module(batch.sample).flatten(1).sum(1) * math.nan
    with pytest.raises(NonFiniteLossError) as caught:
        bench.learn(strategy)
    return str(caught.value)


def checkpoints(bench: Bench, given: dict[str, Any]) -> Any:
    kept, save = [], trainer_module.save_checkpoint

    def listed(folder, *arguments, **named):
        save(folder, *arguments, **named)
        kept.append(sorted(path.name for path in folder.iterdir()))

    with bench.patch.context() as patch:
        patch.setattr(trainer_module, "save_checkpoint", listed)
        bench.learn(**{"base_train_steps": 9, **given})
    return kept


def reported(bench: Bench, given: dict[str, Any]) -> Any:
    asked = []
    bench.patch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    bench.patch.setattr(Accelerator, "init_trackers", lambda self, name: asked.append((name, self.log_with)))
    bench.begin(**given)
    return asked


def pushed(bench: Bench, given: dict[str, Any]) -> Any:
    asked = []

    class Repository:
        def __init__(self, name, *, private):
            asked.append((name, private))
            self.repo_id = name

    bench.patch.setattr(publishing, "HubRepository", Repository)
    bench.patch.setattr(publishing, "push_all", lambda *_, license, **__: asked.append(license) or [])
    trainer = bench.begin(**given)
    for listener in trainer.listeners:
        if isinstance(listener, publishing.Publisher):
            listener.end_task(trainer.tasks[0])
    return asked


def updated(bench: Bench, given: dict[str, Any]) -> Any:
    out = bench.folder / "out"
    pipe = FunLoraPipeline(make_tiny_unet(), FlowMatchEulerDiscreteScheduler())
    write_adapters(pipe, out, classes=[0, 1])
    if "update_class" in given:
        return bench.begin(**given, output_dir=str(out)).asked
    strategy = bench.strategy("funlora", update_class=0, output_dir=str(out), **given)
    strategy = FunLora(replace(strategy.setting, output_dir=out, base_dir=out / "base"))
    return [parameter.tolist() for parameter in strategy.build_update(0).parameters.values()]


class Sampled(Small):
    """As if it had learned."""

    learning_changes_past_classes = True
    has_frozen_base = True

    def inference(self, class_ids):
        return nullcontext()


def evaluated(bench: Bench, given: dict[str, Any]) -> Any:
    """What is asked of the sampler, of the classifier and of the measures."""
    asked: list[Any] = []
    strategy = Sampled(replace(bench.strategy("funlora").setting, tasks=TASKS[:1]))

    def draw(pipe, class_id, count, **named):
        asked.append((count, named))
        return Samples(torch.zeros(count, 1, 8, 8), 1.0)

    def train(images, labels, *, config, **_):
        asked.append(config)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))

    def compare(*_, neighbours):
        asked.append(neighbours)
        return ClassifierConfig()  # any dataclass

    stubs = {
        "draw_samples": draw,
        "train_classifier": train,
        "compare_images": compare,
        "reference_features": lambda *_, config, **__: asked.append(config),
        "held_out_loss": lambda *_, num_sigmas, **__: asked.append(num_sigmas),
        "image_grid": lambda *_, **__: None,
        "folder_sha256": lambda *_, **__: "",
    }
    for name, stub in stubs.items():
        bench.patch.setattr(evaluator_module, name, stub)
    drawn = Drawn()
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluator = evaluator_module.RunEvaluator(
        strategy,
        SimpleNamespace(
            class_names=NAMES,
            count=lambda class_id, split: 5,
            images=lambda class_id, split="": drawn.images(class_id),
        ),
        config=EvaluationArguments(**{"num_samples_per_class": 3, **given}),
        folder=RunFolder(strategy.setting.output_dir),
        accelerator=Accelerator(cpu=True),
    )
    evaluator.end_task(TASKS[0])
    if given.get("evaluation", True):
        evaluator.image_quality()
    return asked


def drawn_beside(bench: Bench, given: dict[str, Any]) -> Any:
    write_json(bench.folder / "results.json", {"A": [99.0, 98.0]})
    bench.patch.chdir(bench.folder)
    return joint_average_accuracies(given["joint_results"], 2)


DATA = {
    "dataset_name": Case("", ("user/one", "user/other"), images),
    "dataset_config_name": Case("", (None, "large"), images),
    "dataset_revision": Case("", (None, "v2"), images),
    "image_column": Case("", ("image", "picture"), images),
    "label_column": Case("", ("label", "kind"), images),
    "train_split": Case("", ("train", "validation"), images),
    "test_split": Case("", (None, "validation"), images),
    "validation_fraction": Case(1.0, (None, 0.5), images),
    "max_images_per_class": Case(0, (None, 2), images, {"dataset_name": "user/one"}),
    "random_flip": Case("yes", (False, True), begun(lambda trainer: trainer.batches.random_flip)),
    "classes_per_task": Case(0, (1, 2), tasks),
    "num_tasks": Case(0, (1, None), tasks),
    "class_order_seed": Case(-1, (None, 2), tasks, {"classes_per_task": 1}),
    "class_order": Case([1.5], (None, ["b", "2", "0"]), tasks, {"classes_per_task": 1}),
}
MODEL = {
    "base_model": Case("", (None, "user/base"), existing_base),
    "base_model_revision": Case("v1", (None, "v1"), existing_base, {"base_model": "user/base"}),
    "unet_config": Case(
        {**TINY_UNET, "num_class_embeds": 2},
        (TINY_UNET, ATTENTION),
        begun(lambda trainer: dict(base_module.base_shape(trainer.strategy.setting).config)),
    ),
    "peft_method": Case("lora", ("funlora", "vanilla_mul"), config),
    "function": Case("sine", ("cosine", "power"), config),
    "num_functions": Case(0, (10, 3), config),
    "train_omega": Case("yes", (True, False), config),
    "operation": Case("div", ("mul", "add"), config),
    "rank": Case(0, (None, 2), config),
    "ratio": Case(0, (1, 2), config),
    "target_modules": Case([], (None, ["all"]), config),
}
TRAINING = {
    "output_dir": Case("", ("one", "other"), placed),
    "overwrite_output_dir": Case("yes", (False, True), run_in_folder),
    "resume_from_checkpoint": Case("newest", (None, "latest"), run_in_folder),
    "strategy": Case("magic", ("funlora", "frozen"), begun(lambda trainer: trainer.strategy.name)),
    "strategy_options": Case(
        ["targets"],
        (["targets=attention"], ["targets=both"]),
        begun(lambda trainer: trainer.strategy.options),
        {"strategy": "magmax"},
    ),
    "seed": Case(2**63, (0, 1), trained),
    "deterministic": Case("yes", (True, False), deterministic),
    "mixed_precision": Case("fp8", ("no", "bf16"), begun(lambda trainer: trainer.accelerator.mixed_precision)),
    "channels_last": Case("yes", (False, True), built),
    "torch_compile": Case("yes", (False, True), built),
    "gradient_accumulation_steps": Case(0, (1, 2), trained),
    "max_grad_norm": Case(0.0, (None, 1e-3), trained),
    "max_nonfinite_steps": Case(-1, (0, 1), skipped),
    "timestep_density": Case("normal", ("uniform", "logit_normal"), trained),
    "class_batches": Case(
        "random",
        ("homogeneous", "mixed"),
        begun(lambda trainer: [phase.name for phase in trainer.strategy.phases(trainer.tasks[1])]),
        {"classes_per_task": 1, "num_tasks": 2},
    ),
    "max_train_steps": Case(0, (None, 1), trained),
    "checkpointing_steps": Case(0, (2, 3), checkpoints),
    "checkpoints_total_limit": Case(0, (1, None), checkpoints, {"checkpointing_steps": 2}),
    "time_limit_minutes": Case(0.0, (None, 5.0), begun(lambda trainer: trainer.limit.minutes)),
    "report_to": Case("", ("none", "tensorboard"), reported),
    "push_to_hub": Case("yes", (False, True), pushed),
    "hub_model_id": Case("a/b/c", ("user/one", "user/other"), pushed, {"push_to_hub": True}),
    "hub_private_repo": Case("yes", (None, True), pushed, {"push_to_hub": True}),
    "hub_license": Case("", (None, "mit"), pushed, {"push_to_hub": True}),
    "base_train_steps": Case(0, (3, 4), base_alone),
    "base_epochs": Case(0, (1, 2), base_alone, {"base_train_steps": None}),
    "base_batch_size": Case(0, (3, 4), base_alone),
    "base_learning_rate": Case(0.0, (1e-3, 1e-2), base_alone),
    "base_warmup_steps": Case(-1, (0, 3), base_alone),
    "base_ema_decay": Case(1.5, (0.0, 0.99), base_alone),
    "base_ema_warmup": Case("yes", (True, False), base_alone),
    "base_ema_start": Case(-0.1, (0.0, 0.5), base_alone),
    "adapter_train_steps": Case(0, (2, 3), class_alone),
    "adapter_epochs": Case(0, (1, 2), class_alone, {"adapter_train_steps": None}),
    "adapter_batch_size": Case(0, (3, 4), class_alone),
    "adapter_learning_rate": Case(0.0, (1e-3, 1e-2), class_alone),
    "adapter_adam_beta1": Case(1.0, (0.5, 0.9), class_alone),
    "adapter_alpha_rate": Case(0.0, (1.0, None), factors),
    "adapter_omega_rate": Case(-1.0, (1.0, 3.0), factors),
    "adapter_vector_rate": Case(0.0, (1.0, 0.5), factors),
    "adapter_start": Case("warm", ("cold", "mean"), started),
    "adapter_target": Case("mean", ("sample", "expected"), class_alone),
    "adapter_pairs": Case("yes", (False, True), class_alone),
    "adapter_warmup_steps": Case(-1, (0, 3), class_alone),
    "adapter_ema_decay": Case(1.5, (0.0, 0.98), class_alone),
    "adapter_ema_warmup": Case("yes", (True, False), class_alone),
    "adapter_ema_start": Case(-0.1, (0.0, 0.7), class_alone),
    "update_class": Case(-1, (0, 1), updated),
    "update_mode": Case("again", ("continue", "retrain"), updated),
}
EVALUATION = {
    "evaluation": Case("yes", (True, False), evaluated),
    "num_samples_per_class": Case(0, (3, 4), evaluated),
    "sampling_batch_size": Case(0, (3, 4), evaluated),
    "solver": Case("rk5", ("heun", "rk4"), evaluated),
    "num_inference_steps": Case(0, (3, 4), evaluated),
    "guidance_scale": Case(-1.0, (1.0, 1.3), evaluated),
    "solver_tolerance": Case(0.0, (1e-5, 1e-3), evaluated),
    "num_probe_samples": Case(0, (3, 4), evaluated, {"num_samples_per_class": 2}),
    "held_out_sigmas": Case(0, (3, 4), evaluated),
    "classifier_architecture": Case("vit", ("auto", "resnet18"), evaluated),
    "classifier_epochs": Case(0, (3, 4), evaluated),
    "classifier_batch_size": Case(1, (3, 4), evaluated),
    "classifier_learning_rate": Case(0.0, (0.1, 0.2), evaluated),
    "classifier_crop_padding": Case(-1, (0, 1), evaluated),
    "classifier_flip": Case("yes", (False, True), evaluated),
    "image_quality": Case("fid", ("classifier", "none"), evaluated),
    "image_quality_neighbours": Case(0, (3, 4), evaluated),
    "joint_results": Case("", (None, "results.json"), drawn_beside),
}
ARGUMENTS = {
    DataArguments: DATA,
    ModelArguments: MODEL,
    ContinualTrainingArguments: TRAINING,
    EvaluationArguments: EVALUATION,
}


def adapter(cls: type[PeftConfig]) -> Callable[[Bench, dict[str, Any]], Any]:
    """What a model with an adapter gives, and what of it is trained."""

    def seen(bench: Bench, given: dict[str, Any]) -> Any:
        given = {"init_weights": False, "target_modules": ["conv1", "conv_out"], **given}
        torch.manual_seed(0)
        model = get_peft_model(make_tiny_unet(), cls(**given)).eval()
        x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
        with torch.no_grad():
            output = model(x, torch.tensor([500.0]), torch.tensor([0])).sample
        trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        return output.flatten().tolist(), trained

    return seen


def fitting(bench: Bench, given: dict[str, Any]) -> Any:
    unet = make_tiny_unet()
    fingerprint = given["base_fingerprint"]
    own = base_fingerprints(unet) if fingerprint == "own" else fingerprint
    try:
        FingerprintCheck(unet).check(FunLoraConfig(base_fingerprint=own), "here")
    except BaseMismatchError:
        return "refused"
    return "taken"


def carded(bench: Bench, given: dict[str, Any]) -> Any:
    config = FunLoraConfig(**given)
    return str(adapter_card(config, class_label=3, class_name="three", parameters=1))


FUNLORA = {
    "r": Case(0, (1, 2), adapter(FunLoraConfig)),
    "function": Case("sine", ("cosine", "power"), adapter(FunLoraConfig)),
    "num_functions": Case(0, (10, 3), adapter(FunLoraConfig)),
    "train_omega": Case("yes", (True, False), adapter(FunLoraConfig)),
    "operation": Case("div", ("mul", "add"), adapter(FunLoraConfig)),
    "ratio": Case(0, (1, 2), adapter(FunLoraConfig)),
    "init_weights": Case("yes", (True, False), adapter(FunLoraConfig)),
    "target_modules": Case(3, (["conv1"], ["conv2"]), adapter(FunLoraConfig)),
    "exclude_modules": Case(3, (None, ["conv_out"]), adapter(FunLoraConfig)),
    "modules_to_save": Case("conv_in", (None, ["conv_in"]), adapter(FunLoraConfig)),
    "layers_to_transform": Case(
        "0", ([0], [1]), adapter(FunLoraConfig), {"target_modules": ["conv1"], "layers_pattern": "resnets"}
    ),
    "layers_pattern": Case(
        3, ("resnets", "up_blocks"), adapter(FunLoraConfig), {"target_modules": ["conv1"], "layers_to_transform": [0]}
    ),
    "class_embedding": Case(3, (None, "class_embedding"), adapter(FunLoraConfig)),
    "class_label": Case(-1, (1, 2), lambda bench, given: class_of(FunLoraConfig(**given))),
    "class_name": Case(3, ("one", "two"), lambda bench, given: class_of(FunLoraConfig(**given))),
    "base_fingerprint": Case({"float32": "0"}, ("own", {"float32": "0" * 64}), fitting),
    "started_from": Case({"class_2": "0"}, (None, {"class_2": "0" * 64}), carded),
}


def of_convolutions(cls: type[PeftConfig]) -> dict[str, Case]:
    return {
        "target_modules": Case(3, (["conv1"], ["conv2"]), adapter(cls)),
        "exclude_modules": Case(3, (None, ["conv_out"]), adapter(cls)),
        "modules_to_save": Case("conv_in", (None, ["conv_in"]), adapter(cls)),
        "trainable_token_indices": Case({"class_embedding": 0}, (None, {"class_embedding": [0]}), adapter(cls)),
        "init_weights": Case("yes", (True, False), adapter(cls)),
    }


CONV_LORA = {
    **of_convolutions(ConvLoraConfig),
    "r": Case(0, (1, 2), adapter(ConvLoraConfig)),
    "lora_alpha": Case(0, (1, 2), adapter(ConvLoraConfig)),
    "bottleneck": Case("wide", ("kernel", "rank"), adapter(ConvLoraConfig)),
}


def classifier(bench: Bench, given: dict[str, Any]) -> Any:
    given = {"epochs": 2, "batch_size": 3, "architecture": "cnn", **given}
    drawn = torch.cat([Drawn().images(class_id) for class_id in (0, 7)])
    labels = torch.tensor([0, 1]).repeat_interleave(5)
    trained = train_classifier(drawn, labels, num_classes=2, config=ClassifierConfig(**given), seed=0)
    return sum(p.double().abs().sum().item() for p in trained.parameters())


CLASSIFIER = {
    "epochs": Case(0, (1, 2), classifier),
    "batch_size": Case(1, (3, 4), classifier),
    "learning_rate": Case(0.0, (0.1, 0.2), classifier),
    "crop_padding": Case(-1, (0, 1), classifier),
    "horizontal_flip": Case("yes", (False, True), classifier),
    "max_train_steps": Case(0, (None, 1), classifier),
    "architecture": Case("vit", ("cnn", "resnet18"), classifier, {"epochs": 1, "max_train_steps": 1}),
}


def replayed(name: str) -> Callable[[Bench, dict[str, Any]], Any]:
    """What `replay`, `ddgr` or `guide` asks of the sampler, and how it trains its classifier."""

    def seen(bench: Bench, given: dict[str, Any]) -> Any:
        asked = []

        def draw(pipe, class_id, count, *, guidance, **named):
            asked.append(
                (
                    count,
                    {key: named[key] for key in SAMPLING},
                    guidance and (guidance.scale, guidance.largest_weight, guidance.at),
                )
            )
            return Samples(torch.zeros(count, 1, 8, 8), 1.0)

        bench.patch.setattr(generated_images, "draw_samples", draw)
        bench.patch.setattr(STRATEGIES[name], "sampler", lambda *_: None)
        strategy = bench.strategy(name, strategy_options=given)
        setting = strategy.setting
        base_module.save_base(make_tiny_unet(), setting.base_dir, TASKS[0].class_ids, setting.class_names)
        strategy.classifiers.save(TASKS[0], strategy._untrained(len(TASKS[0].class_ids)).state_dict())
        strategy.begin_task(TASKS[1])
        classifying = strategy.phases(TASKS[1])[1]
        module = strategy.build(classifying).module
        last = classifying.settings.train_steps - 1
        strategy.generated(classifying, Batch(*[torch.zeros(1)] * 4, number=last))
        return asked, classifying.settings, [p.shape for p in module.parameters()]

    return seen


def distilled(bench: Bench, given: dict[str, Any]) -> Any:
    """The loss of an image of a past class, of a U-Net that has moved away from the previous one."""
    strategy = bench.strategy("replay", strategy_options=given)
    setting = strategy.setting
    base_module.save_base(make_tiny_unet(), setting.base_dir, TASKS[0].class_ids, setting.class_names)
    phase = strategy.phases(TASKS[1])[0]
    module = strategy.build(phase).module
    with torch.no_grad():
        module.conv_out.bias += 1.0
    image = torch.zeros(1, 1, 8, 8)
    batch = Batch(image, torch.tensor(TASKS[0].class_ids[:1]), image, torch.full((1,), 0.5))
    return strategy.training_step(phase, batch, module).item()


def joined(bench: Bench, given: dict[str, Any]) -> Any:
    """What `jdcl` asks of the sampler, and the settings, losses and a gradient of each phase in its middle."""
    asked, found = [], []

    def draw(pipe, class_id, count, *, guidance, **named):
        asked.append((count, {key: named[key] for key in SAMPLING}))
        return Samples(torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(class_id)), 1.0)

    bench.patch.setattr(generated_images, "draw_samples", draw)
    strategy = bench.strategy("jdcl", strategy_options={"head_hidden": 4, **given})
    for phase in (phase for task in TASKS for phase in strategy.phases(task)):
        torch.manual_seed(0)
        trainable = strategy.build(phase)
        sample, noise = torch.randn(2, 8, 1, 8, 8)
        labels = torch.tensor(phase.class_ids).repeat(8)[:8]
        real = Batch(sample, labels, noise, torch.rand(8), number=phase.settings.train_steps // 2)
        losses = strategy.training_step(phase, strategy.make_batch(phase, real), trainable.module)
        losses.sum().backward()
        found.append((phase.settings, losses.tolist(), trainable.module.unet.conv_in.weight.grad.sum().item()))
        strategy.end_phase(phase, trainable)
        strategy.release_phase(phase, trainable)
    return asked, found


def in_two_heads(bench: Bench, given: dict[str, Any]) -> Any:
    """What `diffclass` asks of the sampler, and the batch and the loss of both phases of a task in their middle."""
    asked, found = [], []

    def draw(pipe, class_id, count, *, guidance, **named):
        asked.append((count, {key: named[key] for key in SAMPLING}))
        return Samples(torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(class_id)), 1.0)

    bench.patch.setattr(generated_images, "draw_samples", draw)
    strategy = bench.strategy("diffclass", strategy_options=given)
    setting = strategy.setting
    base_module.save_base(attending_unet(2), setting.base_dir, TASKS[0].class_ids, setting.class_names)
    strategy.begin_task(TASKS[1])
    for phase in strategy.phases(TASKS[1]):
        torch.manual_seed(0)
        trainable = strategy.build(phase)
        sample, noise = torch.randn(2, 40, 1, 8, 8)
        labels = torch.tensor(phase.class_ids).repeat(40)
        real = Batch(sample, labels, noise, torch.rand(40), number=phase.settings.train_steps // 2)
        batch = strategy.make_batch(phase, real)
        strategy.training_step(phase, batch, trainable.module).sum().backward()
        gradients = {name: p.grad.double().abs().sum().item() for name, p in trainable.parameters.items()}
        found.append((phase.settings, batch.class_ids.tolist(), batch.sample.sum().item(), gradients))
        strategy.end_phase(phase, trainable)
    return asked, found


SAMPLING = ("solver", "num_inference_steps", "batch_size")


def merged(name: str) -> Callable[[Bench, dict[str, Any]], Any]:
    """What a LoRA strategy keeps of two tasks, the weights that sample then, and the penalties of training."""

    def seen(bench: Bench, given: dict[str, Any]) -> Any:
        strategy, kept = bench.strategy(name, strategy_options=given, model={"rank": 2}), {}
        penalties = []
        for _ in range(2):
            torch.manual_seed(0)
            trainable = strategy.trainable(attending_unet(), kept)
            for key, parameter in trainable.parameters.items():
                if "lora_B" in key:
                    torch.nn.init.normal_(parameter)
            penalties.append(torch.as_tensor(strategy.penalty()).item())
            kept = strategy.learned(trainable, kept)
        unet = attending_unet()
        strategy.load(unet, kept)
        values = {**kept, **unet.state_dict()}
        return penalties, {key: values[key].double().sum().item() for key in sorted(values)}

    return seen


def tuned(name: str) -> Callable[[Bench, dict[str, Any]], Any]:
    """What a strategy that trains all weights keeps of two tasks."""

    def seen(bench: Bench, given: dict[str, Any]) -> Any:
        few = {"base_train_steps": 2, "adapter_train_steps": 3, "base_batch_size": 4, "adapter_batch_size": 4}
        strategy = learn(bench.strategy(name, strategy_options=given, base_warmup_steps=0, **few))
        return {key: one.double().sum().item() for key, one in strategy.kept.load(TASKS[-1]).items()}

    return seen


def attending_unet(num_classes: int = 3) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**ATTENTION, num_class_embeds=num_classes)


REPLAY = {
    "images_per_class": Case(0, (2, None), replayed("replay")),
    "solver": Case("rk5", ("euler", "heun"), replayed("replay")),
    "num_inference_steps": Case(0, (1, 2), replayed("replay")),
    "sampling_batch_size": Case(0, (2, 5), replayed("replay")),
    "classifier_train_steps": Case(0, (1, 2), replayed("replay")),
    "classifier_batch_size": Case(0, (3, 4), replayed("replay")),
    "classifier_learning_rate": Case(0.0, (1e-3, 1e-2), replayed("replay")),
    "classifier_architecture": Case("vit", ("cnn", "resnet18"), replayed("replay")),
    "distillation": Case(-1.0, (1.0, 3.0), distilled),
}
DDGR = {
    **REPLAY,
    "guidance_scale": Case(-1.0, (0.0, 0.5), replayed("ddgr")),
    "guided_at": Case("noise", ("estimate", "state"), replayed("ddgr")),
    "largest_weight": Case(0.0, (1.0, 10.0), replayed("ddgr")),
}
GUIDE = {
    **REPLAY,
    "guidance_scale": Case(-1.0, (0.0, 0.5), replayed("guide")),
    "refreshes": Case(0, (1, 2), replayed("guide")),
    "largest_weight": Case(0.0, (1.0, 10.0), replayed("guide")),
}
JDCL = {
    "images_per_class": Case(0, (2, None), joined),
    "solver": Case("rk5", ("euler", "heun"), joined),
    "num_inference_steps": Case(0, (1, 2), joined),
    "sampling_batch_size": Case(0, (2, 5), joined),
    "classification_weight": Case(-1.0, (0.0, 0.1), joined),
    "simple_weight": Case(-1.0, (0.0, 0.1), joined),
    "distillation_weight": Case(-1.0, (0.0, 0.1), joined),
    "global_classification_weight": Case(-1.0, (0.0, 0.1), joined),
    "classification_distillation_weight": Case(-1.0, (0.0, 0.1), joined),
    "wait": Case(1.5, (0.4, 0.6), joined, {"global_classification_weight": 1.0}),
    "head_hidden": Case(0, (4, 5), joined),
    "head_dropout": Case(1.5, (0.0, 0.5), joined, {"classification_weight": 1.0}),
    "joint": Case("yes", (True, False), joined),
    "local_start": Case("base", ("global", "scratch"), joined),
    "local_train_steps": Case(0, (1, 2), joined),
    "new_images": Case("both", ("local", "real"), joined),
    "agree": Case("yes", (False, True), joined, {"images_per_class": 30}),
}
DIFFCLASS = {
    "images_per_class": Case(0, (2, None), in_two_heads),
    "solver": Case("rk5", ("euler", "heun"), in_two_heads),
    "num_inference_steps": Case(0, (1, 2), in_two_heads),
    "sampling_batch_size": Case(0, (2, 5), in_two_heads),
    "classifier_train_steps": Case(0, (1, 2), in_two_heads),
    "classifier_batch_size": Case(0, (3, 4), in_two_heads),
    "classifier_learning_rate": Case(0.0, (1e-3, 1e-2), in_two_heads),
    "classifier_architecture": Case("vit", ("cnn", "resnet18"), in_two_heads),
    "targets": Case("all", ("attention", "both"), in_two_heads),
    "matching_share": Case(1.0, (0.0, 0.5), in_two_heads),
    "synthetic_share": Case(-1.0, (0.0, 0.5), in_two_heads),
    "selection": Case("best", ("confidence", "none"), in_two_heads),
    "domain_weight": Case(-1.0, (0.5, 1.0), in_two_heads),
}
L2 = {"penalty": Case(-1.0, (0.0, 1e4), tuned("l2"))}
EWC = {
    "penalty": Case(-1.0, (0.0, 1e6), tuned("ewc"), {"fisher_batches": 1}),
    "fisher_batches": Case(0, (1, 2), tuned("ewc"), {"penalty": 1e6}),
}
HFT = {"share": Case(1.5, (0.0, 0.5), tuned("hft"))}
MOFO = {"share": Case(0.0, (0.5, 1.0), tuned("mofo"))}
LOW_RANK = {"targets": Case("all", ("attention", "both"), merged("naive_lora"))}
MERGE_ORTHOGONAL = {
    **LOW_RANK,
    "orthogonal": Case("both", ("nullspace", "released"), merged("merge_orthogonal"), {"merge": "svd"}),
    "merge": Case("sum", ("concat", "dense"), merged("merge_orthogonal")),
}
MAGMAX = {
    **LOW_RANK,
    "compared": Case("never", ("running", "cumulative"), merged("magmax")),
    "scaling": Case(0.0, (0.5, 1.0), merged("magmax"), {"compared": "cumulative"}),
}
O_LORA = {
    **LOW_RANK,
    "penalty": Case(-1.0, (0.0, 0.1), merged("o_lora")),
    "orthogonal": Case("both", ("A", "B"), merged("o_lora")),
}
C_LORA = {**LOW_RANK, "penalty": Case(-1.0, (0.0, 0.1), merged("clora"))}
CLASSES: dict[type, dict[str, Case]] = {
    **ARGUMENTS,
    FunLoraConfig: FUNLORA,
    ScaleShiftConfig: of_convolutions(ScaleShiftConfig),
    ConvLoraConfig: CONV_LORA,
    ClassifierConfig: CLASSIFIER,
    **{
        STRATEGIES[name].options_class: cases
        for name, cases in {
            "replay": REPLAY,
            "ddgr": DDGR,
            "guide": GUIDE,
            "jdcl": JDCL,
            "diffclass": DIFFCLASS,
            "naive_lora": LOW_RANK,
            "merge_orthogonal": MERGE_ORTHOGONAL,
            "magmax": MAGMAX,
            "l2": L2,
            "ewc": EWC,
            "hft": HFT,
            "mofo": MOFO,
            "o_lora": O_LORA,
            "clora": C_LORA,
        }.items()
    },
}


def own_fields(cls: type) -> list[str]:
    """Of a PEFT configuration, PEFT's own are left out: the tuner's tests are PEFT's."""
    given = {one.name for one in fields(PeftConfig)} if issubclass(cls, PeftConfig) else set()
    return [one.name for one in fields(cls) if one.name not in given]


# One test for equal fields of options that inherit them.
EACH = [
    pytest.param(cls, name, id=f"{cls.__name__}.{name}")
    for cls, cases in CLASSES.items()
    for name in cases
    if not any(name in own_fields(parent) for parent in cls.__mro__[1:] if parent in CLASSES)
]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    yield Bench(tmp_path, monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "cls", [*CLASSES, *(s.options_class for s in STRATEGIES.values() if s.options_class not in (None, *CLASSES))]
)
def test_every_field_has_a_case(cls):
    assert sorted(CLASSES.get(cls, {})) == sorted(own_fields(cls))


@pytest.mark.parametrize(("cls", "name"), EACH)
def test_a_value_out_of_range_is_refused_at_construction(cls, name):
    beside = {} if name == "base_model_revision" else CLASSES[cls][name].beside
    given = {**{key: value for key, value in beside.items() if key in own_fields(cls)}, name: CLASSES[cls][name].bad}
    with pytest.raises(ValueError, match=f"`{name}[`.]"):
        if cls in ARGUMENTS:
            RunArguments(*(one(**(given if one is cls else {})) for one in ARGUMENTS))
        else:
            cls(**given)


@pytest.mark.parametrize(("cls", "name"), EACH)
def test_two_values_do_not_come_to_the_same(cls, name, bench, caplog):
    caplog.set_level(logging.ERROR)
    case = CLASSES[cls][name]
    first, second = (case.seen(bench, {**copy.deepcopy(case.beside), name: value}) for value in case.pair)
    assert first != second
