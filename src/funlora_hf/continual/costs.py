"""Estimate the costs of a run: counts from its arguments, and hours from the speed of a few steps of each kind on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ..classifier import build_classifier, training_steps
from ..data.image_data import ImageClassificationData
from ..data.known_counts import KnownCounts
from .config import EvaluationArguments
from .strategy import Batch, Phase, Strategy, Trainable
from .trainer import images_per_step, phase_steps


# How long steps are timed, without the first ones.
MEASURED_SECONDS = 2.0

Step = Callable[[int], None]


@dataclass
class Part:
    """One kind of work of a run.

    Args:
        unit: "steps" of an optimizer, or "evaluations" of the U-Net for one image each.
        images: images in a unit.
        phase: a phase that has these steps; None if no phase of the strategy has them.
        flops: floating-point operations of the whole part, as torch counts them, after they are measured.
        memory: for a phase, bytes of weights, gradients, moments, average and what a step keeps for its backward pass.
        seconds: seconds of a unit, after they are measured.
    """

    name: str
    unit: str
    count: int
    images: int = 1
    phase: Phase | None = None
    flops: float = 0.0
    memory: float | None = None
    seconds: float = 0.0

    def measure(self, step: Step, images: int, device: torch.device) -> float:
        """Measure the costs of a step with so many images; returns the bytes that it keeps."""
        flops, kept, seconds = measure_step(step, images, device)
        self.flops = flops * self.count * self.images / images
        self.seconds = seconds * self.images / images
        return kept


def count_parts(
    strategy: Strategy, data: ImageClassificationData | KnownCounts, evaluation: EvaluationArguments
) -> list[Part]:
    """Count all work of a run from start to end, by kind. The strategy exists but has not begun."""
    setting, training = strategy.setting, strategy.setting.training
    classifier = evaluation.classifier(training.max_train_steps)
    parts: dict[str, Part] = {}
    for phase in (phase for task in setting.tasks for phase in strategy.phases(task)):
        kind = phase.name.rstrip("_0123456789")  # class_7 and class_8 are of the same kind
        images = images_per_step(phase.settings, training)
        part = parts.setdefault(kind, Part(f"training: {kind}", "steps", 0, images, phase))
        part.count += phase_steps(phase.settings, sum(data.count(class_id) for class_id in phase.class_ids), training)
    seen, changes = [setting.seen(task) for task in setting.tasks], strategy.learning_changes_past_classes
    # Classes that learning changes are sampled and measured again after each task.
    drawn = (
        evaluation.num_samples_per_class * (sum(map(len, seen)) if changes else len(seen[-1])) * evaluation.evaluation
    )
    drawn += evaluation.num_probe_samples * len(seen[-1]) * (2 if strategy.has_frozen_base else evaluation.evaluation)
    real, test = (
        {c: data.count(c, split=split) if c in data.class_names else 0 for c in seen[-1]}
        for split in ("train", "test")
    )
    measured = strategy.has_held_out_loss * sum(
        test[class_id] for classes in [*(seen if changes else []), seen[-1]] for class_id in classes
    )
    classified = []
    if all(real[class_id] for class_id in seen[0]) and all(test.values()):
        classified = [sum(real[class_id] for class_id in seen[0])]
        classified += [len(classes) * evaluation.num_samples_per_class for classes in seen[1:]]
        if all(real.values()):
            classified.append(sum(min(number, evaluation.num_samples_per_class) for number in real.values()))
    if evaluation.image_quality == "classifier" and any(test.values()):
        classified.append(sum(real.values()))
    steps = sum(training_steps(number, classifier)[1] for number in classified)
    per_image = strategy.evaluations_per_image(evaluation.solver, evaluation.num_inference_steps)
    if evaluation.guidance_scale != 1 and not strategy.outside_data:
        per_image *= 2
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
    """Measure FLOPs, memory and seconds in a few steps of each kind with random images.

    The strategy has an empty folder and writes there what the next kind of work needs.
    """
    device, (channels, size) = accelerator.device, strategy.setting.image_shape
    shape = (channels, size, size)
    class_id = strategy.setting.tasks[0].class_ids[0]
    for part in parts:
        if (phase := part.phase) is not None:
            trainable = strategy.build(phase)
            try:
                step = _training_step(strategy, phase, trainable, accelerator, shape)
                kept = part.measure(step, phase.settings.batch_size, device)
                weights = sum(parameter.nbytes for parameter in trainable.module.parameters())
                # Parameters also have a gradient, two moments and an average.
                part.memory = kept + weights + 4 * sum(p.nbytes for p in trainable.parameters.values())
                strategy.end_phase(phase, trainable)
                class_id = phase.class_ids[0]
            finally:
                strategy.release_phase(phase, trainable)
    with strategy.inference([class_id]) as pipe:

        def sample(size: int) -> None:
            pipe([class_id] * size, num_inference_steps=1, solver="euler", output_type="pt")

        for part in parts:
            if part.unit == "evaluations":
                part.measure(sample, evaluation.sampling_batch_size, device)
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
            part.measure(classify, part.images, device)


def _training_step(
    strategy: Strategy, phase: Phase, trainable: Trainable, accelerator: Accelerator, shape: tuple[int, ...]
) -> Step:
    """Return a training step on a batch of any size, at a learning rate of 0."""
    parameters, device = list(trainable.parameters.values()), accelerator.device
    on_gpu = device.type == "cuda"
    optimizer = strategy.make_optimizer(phase, trainable, lr=0.0, weight_decay=0.0, fused=True if on_gpu else None)
    ema = EMAModel(parameters, decay=0.0, foreach=on_gpu)

    def step(size: int) -> None:
        # Sorted, like batches of several classes.
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


def measure_step(step: Step, batch_size: int, device: torch.device) -> tuple[float, float, float]:
    """Measure a step on batches of 2 images or more, as large as time permits, and scale the result.

    Returns:
        For a step with the whole batch: floating-point operations as torch counts them, of matrix products and
        convolutions; bytes kept for the backward pass, without parameters; seconds on this machine.
    """
    # Not 1, for which batch normalization may have no variance.
    (flops, kept), (more_flops, more_kept) = (_count(step, size) for size in (2, 3))
    size = min(2, batch_size)
    # Small batches are slower.
    while (seconds := _time(step, size, device)) < MEASURED_SECONDS / 8 and size < batch_size:
        size = min(4 * size, batch_size)
    repeats = max(1, round(MEASURED_SECONDS / seconds))
    seconds = median(_time(step, size, device) for _ in range(repeats))
    more = batch_size - 2
    return flops + more * (more_flops - flops), kept + more * (more_kept - kept), seconds * batch_size / size


def _count(step: Step, size: int) -> tuple[int, int]:
    """Count the FLOPs and the bytes kept."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        step(size)
    return counter.get_total_flops(), sum(kept.values())


def _time(step: Step, size: int, device: torch.device) -> float:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    step(size)
    wait()
    return time.perf_counter() - started
