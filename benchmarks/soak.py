"""200 classes of tiny images learned one after another in one process: its memory, the time a class takes, what is lost.

A base learns the first four classes; then every class is a task of its own, learned, sampled and judged as in any run, on one
thread. After each task, behind a collection of garbage, the process is looked at. The images are patterns in noise, drawn from
a seed and read from PNG files.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import datasets
import numpy as np
import PIL.Image
import psutil
import torch
from diffusers import UNet2DModel
from interleaved import RESULTS, Comparison, Curve, Findings, Point, comparison, main, point
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from funlora_hf.continual.config import ContinualTrainingArguments, DataArguments, EvaluationArguments, ModelArguments
from funlora_hf.data.tasks import Task
from funlora_hf.evaluation.evaluator import RunEvaluator
from funlora_hf.evaluation.figures import BLUE, DPI, GREEN, GREY, ORANGE, STYLE, VERMILION
from funlora_hf.run import RunArguments, run
from funlora_hf.utils.files import read_json, whole_file


CLASSES = 200
BASE_CLASSES = 4
# What is said of a number of classes is said of so many, of which it is the last.
WINDOW = 20
TRAIN_IMAGES = 12
TEST_IMAGES = 4
SEED = 0
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
LEARN = "learn a class"
SAMPLE = "draw its samples"
JUDGE = "train and test a classifier of all classes so far"
YARDSTICK = "the same work each time"
SECONDS = {LEARN: "learning", SAMPLE: "sampling", JUDGE: "judging", YARDSTICK: "yardstick"}
MEMORY = "resident memory"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "soak.png"


@dataclass(frozen=True)
class Look:
    """The process when a task is over.

    Args:
        classes: learned until then.
        learning: seconds from the end of the task before to the evaluation; None: this is the first task.
        sampling: seconds of the evaluation until all images are drawn.
        judging: seconds of the rest of it.
        yardstick: seconds of work that is always the same, done right after: by them the machine's own pace shows.
        memory: resident, in bytes.
        tensors: that are alive.
        modules: that are alive.
        tensor_bytes: of the tensors' storages, each once.
        open_files: file descriptors.
    """

    classes: int
    learning: float | None
    sampling: float
    judging: float
    yardstick: float
    memory: int
    tensors: int
    modules: int
    tensor_bytes: int
    open_files: int


@dataclass(frozen=True)
class Soak:
    """What has come of it.

    Args:
        looks: after each task.
        results: contents of results.json.
        memory_at_the_end: resident, in bytes, with results.json and all figures written.
    """

    looks: Sequence[Look]
    results: Mapping[str, Any]
    memory_at_the_end: int


def measure(classes: int = CLASSES) -> Findings:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soak = learn(Path(folder), classes)
    looks = soak.looks[1:]
    memory = {look.classes: look.memory for look in looks}
    open_files = [look.open_files for look in looks]
    forgetting = soak.results["zero_forgetting"]
    facts = {
        "command": "python benchmarks/soak.py",
        "seed": SEED,
        f"memory at class {classes} / at class {WINDOW}, goal <= 1.1": memory[classes] / memory[WINDOW],
        "memory at the end, with results.json and all figures written, in MB": soak.memory_at_the_end / 1e6,
        "classes whose first samples were drawn again at the end": forgetting["classes_compared"],
        "classes whose first samples had changed by a bit": len(forgetting["classes_changed"]),
        "base unchanged to the byte": forgetting["base_sha256_before"] == forgetting["base_sha256_after"],
        "tensors that a class adds to the process": slope(looks, "tensors"),
        "bytes of tensors that a class adds to the process": slope(looks, "tensor_bytes"),
        "modules that a class adds to the process": slope(looks, "modules"),
        "file descriptors, fewest and most": [min(open_files), max(open_files)],
        "seconds of the whole run": soak.results["seconds"]["total"],
        "seconds of its report, figures included": soak.results["seconds"]["report"],
        "cores of the machine": os.cpu_count(),
        "processes on them, mean over the last 15 minutes": os.getloadavg()[2],
    }
    return Findings(rows=ratios(looks), curves=curves(looks), facts=facts, series=series(looks))


def learn(folder: Path, classes: int, **settings: Any) -> Soak:
    """
    Train a base and then class after class in this process.

    Args:
        folder: for images and runs.
        classes: in all.
        settings: overrides of arguments, by the name of their field.
    """
    write_images(folder / "images", classes)
    looks: list[Look] = []
    # Not into the cache of whoever runs this.
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", os.fspath(folder / "cache")):
        run(arguments(folder, "base_run", **settings, classes_per_task=BASE_CLASSES, num_tasks=1))
        with watched(folder / "run", looks):
            base = os.fspath(folder / "base_run" / "base")
            results = run(arguments(folder, "run", **settings, classes_per_task=1, base_model=base))
    gc.collect()
    return Soak(looks, results, psutil.Process().memory_info().rss)


def write_images(folder: Path, classes: int) -> None:
    """PNG files in `folder/<split>/class_<id>`: a pattern for each class, in noise of its own for each image."""
    for class_id in range(classes):
        generator = np.random.default_rng([SEED, class_id])
        pattern = np.kron(generator.uniform(0, 255, (4, 4)), np.ones((2, 2)))
        for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
            target = folder / split / f"class_{class_id:03}"
            target.mkdir(parents=True)
            for number in range(count):
                pixels = (pattern + generator.normal(0, 16, pattern.shape)).clip(0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(target / f"{number}.png")


def arguments(folder: Path, name: str, **overrides: Any) -> RunArguments:
    """Of a run on the images, small in all but its number of classes."""
    values = {
        "dataset_name": os.fspath(folder / "images"),
        "unet_config": UNET,
        "output_dir": os.fspath(folder / name),
        "seed": SEED,
        "base_train_steps": 100,
        "base_batch_size": 12,
        "adapter_train_steps": 30,
        "adapter_batch_size": 12,
        "adapter_warmup_steps": 5,
        "checkpointing_steps": 10,
        "num_samples_per_class": 4,
        "num_probe_samples": 2,
        "num_inference_steps": 4,
        "held_out_sigmas": 2,
        "classifier_epochs": 2,
        **overrides,
    }
    parts = (DataArguments, ModelArguments, ContinualTrainingArguments, EvaluationArguments)
    return RunArguments(
        *(part(**{key: values[key] for key in values if key in part.__dataclass_fields__}) for part in parts)
    )


@contextmanager
def watched(run_folder: Path, looks: list[Look]) -> Iterator[None]:
    """Looks at the process after every task of a run, outside the seconds that are counted."""
    end_task = RunEvaluator.end_task
    ended: list[float] = []
    unet = UNet2DModel(**UNET).eval()

    def end_and_look(evaluator: RunEvaluator, task: Task) -> None:
        learning = time.perf_counter() - ended.pop() if ended else None
        end_task(evaluator, task)
        seconds = read_json(run_folder / "checkpoints" / "evaluation" / f"task_{task.index + 1}.json")["seconds"]
        classes = sum(len(earlier.class_ids) for earlier in evaluator.tasks[: task.index + 1])
        looks.append(Look(classes, learning, seconds["sampling"], seconds["classifier"], pace(unet), **held()))
        ended.append(time.perf_counter())

    with mock.patch.object(RunEvaluator, "end_task", end_and_look):
        yield


@torch.no_grad()
def pace(unet: UNet2DModel, forwards: int = 20) -> float:
    """Seconds of some forwards, which no number of classes changes."""
    sample = torch.zeros(TRAIN_IMAGES, UNET["in_channels"], UNET["sample_size"], UNET["sample_size"])
    started = time.perf_counter()
    for _ in range(forwards):
        unet(sample, 0.5)
    return time.perf_counter() - started


def held() -> dict[str, int]:
    """What the process holds now, by the fields of `Look`."""
    gc.collect()
    process = psutil.Process()
    memory, open_files = process.memory_info().rss, process.num_fds()
    # By type: some objects act as if they were of another class when they are asked.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not is_fake(thing)]
    modules = sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects())
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return {
        "memory": memory,
        "tensors": len(tensors),
        "modules": modules,
        "tensor_bytes": sum(sizes.values()),
        "open_files": open_files,
    }


def slope(looks: Sequence[Look], name: str) -> float:
    """What a quantity grew by for each class, on average from class `WINDOW` to the last."""
    first, last = next(look for look in looks if look.classes == WINDOW), looks[-1]
    return (getattr(last, name) - getattr(first, name)) / (last.classes - first.classes)


def windows(looks: Sequence[Look]) -> dict[int, list[Look]]:
    """The looks by number of classes, in steps of `WINDOW`, each with those before it back to the step before."""
    ends = range(WINDOW, looks[-1].classes + 1, WINDOW)
    return {end: [look for look in looks if end - WINDOW < look.classes <= end] for end in ends}


def curves(looks: Sequence[Look]) -> list[Curve]:
    """Memory as it was at each number of classes, and the seconds of the classes up to it."""
    parts = windows(looks)
    memory = [Point(end, *[part[-1].memory / 1e6] * 3) for end, part in parts.items()]
    seconds = [
        Curve(what, "ms", [point(end, [1000 * getattr(look, field) for look in part]) for end, part in parts.items()])
        for what, field in SECONDS.items()
    ]
    return [Curve(MEMORY, "MB", memory), *seconds]


def ratios(looks: Sequence[Look]) -> list[Comparison]:
    """Seconds of the last classes over those of early ones, the first window left out: a process warms up.

    In the first row by the machine's pace, in seconds of the yardstick: what else a shared machine does cancels.
    """
    parts = windows(looks)
    last, *_, early, _ = reversed(parts)
    names = {end: f"classes {end - WINDOW + 1} to {end}" for end in (last, early)}

    def row(what: str, value: Callable[[Look], float]) -> Comparison:
        title = f"{what}: {names[last]} / {names[early]}"
        return comparison(title, {names[end]: [value(look) for look in parts[end]] for end in (last, early)})

    usual = median(look.yardstick for look in looks)
    at_usual_pace = row(f"{LEARN}, at the machine's usual pace", lambda look: look.learning * usual / look.yardstick)
    return [at_usual_pace, *(row(what, attrgetter(field)) for what, field in SECONDS.items())]


def series(looks: Sequence[Look]) -> dict[str, list[float]]:
    """All that was seen, one number for each class, to draw."""
    return {
        "classes": [look.classes for look in looks],
        f"{MEMORY} (MB)": [look.memory / 1e6 for look in looks],
        **{f"{what} (s)": [getattr(look, field) for look in looks] for what, field in SECONDS.items()},
        "tensors": [look.tensors for look in looks],
    }


def draw(results: Path, figure: Path) -> None:
    """Memory and seconds of a results file over the classes; without matplotlib, says so and draws nothing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f'No figure: {error} (pip install "funlora-hf[bench]")', file=sys.stderr)
        return
    seen = read_json(results)["series"]
    classes, memory = seen["classes"], seen[f"{MEMORY} (MB)"]
    with rc_context(STYLE), whole_file(figure) as temporary:
        canvas = Figure(figsize=(10, 4), layout="constrained")
        left, right = canvas.subplots(1, 2)
        left.plot(classes, memory, color=BLUE, label=MEMORY)
        goal = 1.1 * memory[classes.index(WINDOW)]
        left.axhline(goal, color=VERMILION, linestyle="--", label=f"1.1 times that at class {WINDOW}")
        left.set(title="Memory of the process", xlabel="classes", ylabel="MB", ylim=(0, 1.15 * goal))
        for what, color in zip(SECONDS, (BLUE, GREEN, ORANGE, GREY), strict=True):
            right.plot(classes, seen[f"{what} (s)"], ".", markersize=4, color=color, label=what)
        right.set(title="Time of a class", xlabel="classes", ylabel="seconds")
        # Room for the names of what is drawn, above it.
        right.set_ylim(0, 1.6 * right.get_ylim()[1])
        for axes in (left, right):
            axes.grid(visible=True, color=GREY, alpha=0.3)
            axes.legend()
        canvas.savefig(temporary, dpi=DPI, format="png")


if __name__ == "__main__":
    written = main(__doc__, measure, __file__)
    draw(written, FIGURE if written.parent == RESULTS else written.with_suffix(".png"))
