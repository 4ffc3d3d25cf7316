"""What a run costs: counted from its arguments, and hours by the speed of a few steps of each kind on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.nn import functional

from ..classifier import ClassifierConfig, build_classifier, training_steps
from ..data.image_data import ImageClassificationData
from ..data.known_counts import KnownCounts
from ..sampling.solvers import expected_evaluations
from .base import base_shape
from .config import EvaluationArguments
from .moving_average import MovingAverage
from .step_costs import StepCosts, measure_step
from .strategy import Batch, Phase, Strategy, Trainable
from .trainer import images_per_step, phase_steps


@dataclass
class Part:
    """One kind of work of a run.

    Args:
        name: the kind.
        unit: "steps" of an optimiser, or "evaluations" of the U-Net for one image each.
        count: units.
        images: in a unit.
        phase: one that has these steps; None for what is no phase of the strategy.
        flops: floating-point operations of the whole part, as torch counts them, once they are measured.
        memory: bytes of weights, gradients, moments, average and what a step keeps for its backward pass, of a phase.
        seconds: of a unit, once they are measured.
    """

    name: str
    unit: str
    count: int
    images: int = 1
    phase: Phase | None = None
    flops: float = 0.0
    memory: float | None = None
    seconds: float = 0.0

    def take(self, costs: StepCosts, images: int) -> None:
        """Take what a step with so many images costs."""
        self.flops = costs.flops * self.count * self.images / images
        self.seconds = costs.seconds * self.images / images


def count_parts(
    strategy: Strategy,
    data: ImageClassificationData | KnownCounts,
    evaluation: EvaluationArguments,
    classifier: ClassifierConfig,
) -> list[Part]:
    """All work of a run from its start to its end, by kind.

    Args:
        strategy: of the run, made but not begun.
        data: numbers of images.
        evaluation: how classes are sampled and judged.
        classifier: how evaluation trains classifiers.
    """
    setting, training = strategy.setting, strategy.setting.training
    parts: dict[str, Part] = {}
    for phase in (phase for task in setting.tasks for phase in strategy.phases(task)):
        kind = phase.name.rstrip("_0123456789")  # class_7 and class_8 are of one kind
        images = images_per_step(phase.settings, training)
        part = parts.setdefault(kind, Part(f"training: {kind}", "steps", 0, images, phase))
        part.count += phase_steps(phase.settings, sum(data.count(class_id) for class_id in phase.class_ids), training)
    seen, changes = [setting.seen(task) for task in setting.tasks], strategy.learning_changes_past_classes
    # What learning changes is sampled and measured again after each task.
    drawn = (
        evaluation.num_samples_per_class * (sum(map(len, seen)) if changes else len(seen[-1])) * evaluation.evaluation
    )
    drawn += evaluation.num_probe_samples * len(seen[-1]) * (2 if strategy.has_frozen_base else evaluation.evaluation)
    real, test = (
        {c: data.count(c, split=split) if c in data.class_names else 0 for c in seen[-1]}
        for split in ("train", "test")
    )
    measured = sum(test[class_id] for classes in [*(seen if changes else []), seen[-1]] for class_id in classes)
    classified = []
    if all(real[class_id] for class_id in seen[0]) and all(test.values()):
        classified = [sum(real[class_id] for class_id in seen[0])]
        classified += [len(classes) * evaluation.num_samples_per_class for classes in seen[1:]]
    if evaluation.image_quality == "classifier" and any(test.values()):
        classified.append(sum(real.values()))
    steps = sum(training_steps(number, classifier)[1] for number in classified)
    per_image = expected_evaluations(evaluation.solver, evaluation.num_inference_steps)
    replayed = sum(strategy.replay_evaluations(task) for task in setting.tasks)
    judged = [
        Part("drawing images to replay", "evaluations", replayed),
        Part(f"sampling {drawn:,} images", "evaluations", drawn * per_image),
        Part("held-out loss", "evaluations", evaluation.held_out_sigmas * measured * evaluation.evaluation),
        Part("classifiers", "steps", steps * evaluation.evaluation, classifier.batch_size),
    ]
    return [*parts.values(), *(part for part in judged if part.count)]


def measure_parts(
    parts: Sequence[Part], strategy: Strategy, accelerator: Accelerator, evaluation: EvaluationArguments
) -> None:
    """Fill in FLOPs, memory and seconds by a few steps of each kind with random images.

    Args:
        parts: from `count_parts`.
        strategy: in an empty folder, into which it writes what the next kind of work needs.
        accelerator: for its device and precision.
        evaluation: how classes are sampled and judged.
    """
    device, config = accelerator.device, base_shape(strategy.setting).config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    class_id = strategy.setting.tasks[0].class_ids[0]
    for part in parts:
        if (phase := part.phase) is not None:
            trainable = strategy.build(phase)
            try:
                step = _training_step(strategy, phase, trainable, accelerator, shape)
                costs = measure_step(step, phase.settings.batch_size, device)
                part.take(costs, phase.settings.batch_size)
                weights = sum(parameter.nbytes for parameter in trainable.module.parameters())
                # Gradient, two moments and the average.
                part.memory = costs.kept + weights + 4 * sum(p.nbytes for p in trainable.parameters.values())
                strategy.end_phase(phase, trainable)
                class_id = phase.class_ids[0]
            finally:
                strategy.release_phase(phase, trainable)
    with strategy.inference([class_id]) as pipe:

        def sample(size: int) -> None:
            pipe([class_id] * size, num_inference_steps=1, solver="euler", output_type="pt")

        for part in parts:
            if part.unit == "evaluations":
                size = evaluation.sampling_batch_size
                part.take(measure_step(sample, size, device), size)
    network = build_classifier(
        len(strategy.setting.class_names),
        channels=shape[0],
        image_size=shape[1],
        architecture=evaluation.classifier_architecture,
    ).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)

    def classify(size: int) -> None:
        labels = torch.zeros(size, dtype=torch.long, device=device)
        functional.cross_entropy(network(torch.randn(size, *shape, device=device)), labels).backward()
        optimizer.step()

    for part in parts:
        if part.unit == "steps" and part.phase is None:
            part.take(measure_step(classify, part.images, device), part.images)


def _training_step(
    strategy: Strategy, phase: Phase, trainable: Trainable, accelerator: Accelerator, shape: tuple[int, ...]
) -> Callable[[int], None]:
    """A training step on a batch of any size, at a learning rate of 0."""
    parameters, device = list(trainable.parameters.values()), accelerator.device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True if on_gpu else None)
    ema = MovingAverage(parameters, decay=0.0, warmup=False, start=0, foreach=on_gpu)

    def step(size: int) -> None:
        # Sorted, as batches of several classes are.
        classes = torch.tensor(phase.class_ids)[torch.arange(size) % len(phase.class_ids)].sort().values
        sample, noise = torch.randn(2, size, *shape, device=device)
        with accelerator.autocast():
            batch = Batch(sample, classes, noise, torch.rand(size, device=device))
            loss = strategy.training_step(phase, batch, trainable.module).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)

    return step
