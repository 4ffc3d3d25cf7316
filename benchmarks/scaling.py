"""How cost grows with the number of classes, from 1 to 1,000, on the paper's U-Net; adapters in a PEFT model up to 100.

Memory is that of the adapters' numbers. Folders are as training writes them, one a class: one is written, the others are
copies of it. What is timed takes turns between the numbers of classes.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from adapter_bank import filled, switch
from backbone import adapted, config, paper_unet
from diffusers import FlowMatchEulerDiscreteScheduler
from interleaved import RESULTS, Curve, Findings, Point, main, point, take_turns
from peft import PeftModel

from funlora_hf import AdapterBank, FunLoraPipeline
from funlora_hf.adapters.class_folder import adapter_name, save_adapter
from funlora_hf.evaluation.figures import BLUE, DPI, GREEN, ORANGE, STYLE, VERMILION
from funlora_hf.utils.files import read_json, whole_file


COUNTS = (1, 10, 100, 1000)
# Each adapter in a PEFT model adds to the time of all others' switching and adding.
PEFT_COUNTS = (1, 10, 100)
LOOKS = (
    {"color": BLUE, "marker": "o"},
    {"color": VERMILION, "marker": "s"},
    {"color": GREEN, "marker": "d"},
    {"color": ORANGE, "marker": "^"},
)
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "scaling.png"


def measure(counts: Sequence[int] = COUNTS, peft_counts: Sequence[int] = PEFT_COUNTS) -> Findings:
    torch.set_grad_enabled(False)
    banks = {count: filled(count) for count in counts}
    models = {count: adapted(paper_unet(), *map(adapter_name, range(count))) for count in peft_counts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count, bank in banks.items():
            bank.save(folder / f"{count}.safetensors")
        write_folders(models[min(peft_counts)], folder, max(counts))
        curves = [
            memory(banks),
            *disk(folder, counts),
            in_milliseconds("bank: make a class live", {n: switch(bank) for n, bank in banks.items()}, calls=100),
            in_milliseconds(
                "bank: add a class and take it out", {n: add(bank) for n, bank in banks.items()}, calls=20
            ),
            in_milliseconds("bank: load its file, mapped", {n: load(folder, bank) for n, bank in banks.items()}),
            in_milliseconds(
                "bank: load folders", {n: load_folders(folder, bank) for n, bank in banks.items()}, rounds=3
            ),
            in_milliseconds("PEFT model: make a class live", {n: set_adapter(m) for n, m in models.items()}, calls=5),
            adding("PEFT model: add a class", {n: add_adapter(m) for n, m in models.items()}),
            adding("pipeline: load a class", {n: load_adapter(folder, n) for n in peft_counts}),
        ]
    tensors = len(next(iter(banks.values())).live_tensors)
    return Findings(curves=curves, facts={"tensors of an adapter, each an object of its own in a PEFT model": tensors})


def memory(banks: Mapping[int, AdapterBank]) -> Curve:
    """Of a bank's rows."""
    sizes = {}
    for count, bank in banks.items():
        sizes[count] = sum(tensor.nbytes for label in bank.classes for tensor in bank.state_dict(label).values())
    return exactly("bank: memory of the rows", "kB", {count: size / 1000 for count, size in sizes.items()})


def disk(folder: Path, counts: Sequence[int]) -> list[Curve]:
    """Bytes of a bank's file and of folders, and how many files the folders have."""
    files = {n: (folder / f"{n}.safetensors").stat().st_size / 1000 for n in counts}
    inside = {n: [file.stat() for path in class_folders(folder, n) for file in path.iterdir()] for n in counts}
    return [
        exactly("bank: its file", "kB", files),
        exactly(
            "folders: their files", "kB", {n: sum(s.st_size for s in stats) / 1000 for n, stats in inside.items()}
        ),
        exactly(
            "folders: blocks taken by the files",
            "kB",
            {n: sum(s.st_blocks for s in stats) * 512 / 1000 for n, stats in inside.items()},
        ),
        exactly("folders: number of files", "files", {n: len(stats) for n, stats in inside.items()}),
    ]


def exactly(name: str, unit: str, values: Mapping[int, float]) -> Curve:
    """A curve of what does not vary."""
    return Curve(name, unit, [Point(count, value, value, value) for count, value in values.items()])


def in_milliseconds(
    name: str, sides: Mapping[int, Callable[[], object]], *, rounds: int = 11, calls: int = 1
) -> Curve:
    """A curve of what a function takes, by number of classes."""
    seconds = take_turns(name, sides, rounds=rounds, calls=calls)
    return Curve(name, "ms", [point(count, [1000 * value for value in seconds[count]]) for count in sides])


def write_folders(model: PeftModel, folder: Path, count: int) -> None:
    """Folders of classes as training leaves them, with equal contents."""
    first, *others = class_folders(folder, count)
    save_adapter(model, first, adapter_name(0))
    for path in others:
        shutil.copytree(first, path)


def class_folders(folder: Path, count: int) -> list[Path]:
    return [folder / "adapters" / adapter_name(number) for number in range(count)]


def add(bank: AdapterBank) -> Callable[[], None]:
    """Adds a class by its tensors; it is taken out again so that the bank stays as large as it is."""
    state, label = bank.state_dict(next(iter(bank.classes))), len(bank)

    def run() -> None:
        bank.add_tensors(state, class_label=label)
        bank.remove(label)

    return run


def load(folder: Path, bank: AdapterBank) -> Callable[[], AdapterBank]:
    """Loads a bank of this size; building the model is not counted."""
    file = folder / f"{len(bank)}.safetensors"
    return lambda: AdapterBank.load(file, bank.model)


def load_folders(folder: Path, bank: AdapterBank) -> Callable[[], None]:
    """Fills a bank of this size from folders; building the model is not counted."""
    paths = class_folders(folder, len(bank))

    def run() -> None:
        filling = AdapterBank(bank.model, bank.config)
        for label, path in enumerate(paths):
            # The folders were written for another base of this shape.
            filling.add(path, class_label=label, ignore_base_fingerprint=True)

    return run


def set_adapter(model: PeftModel) -> Callable[[], None]:
    following = itertools.cycle(list(model.peft_config))
    return lambda: model.set_adapter(next(following))


def adding(name: str, sides: Mapping[int, Callable[[int], object]], times: int = 5) -> Curve:
    """One more class, and some more after it, where there are so many."""
    points = []
    for count, function in sides.items():
        milliseconds = []
        for number in range(times):
            started = time.perf_counter()
            function(number)
            milliseconds.append(1000 * (time.perf_counter() - started))
        points.append(point(count, milliseconds))
    return Curve(name, "ms", points)


def add_adapter(model: PeftModel) -> Callable[[int], object]:
    return lambda number: model.add_adapter(f"added_{number}", config())


def load_adapter(folder: Path, count: int) -> Callable[[int], object]:
    """Loads one more class into a pipeline that has so many, as evaluation during training does."""
    pipe = FunLoraPipeline(paper_unet(), FlowMatchEulerDiscreteScheduler())
    path = class_folders(folder, 1)[0]
    labels = itertools.count(len(pipe.classes))

    def run(number: int) -> None:
        label = next(labels)
        # The adapters were written for another base of this shape.
        pipe.load_adapter(path, class_label=label, class_name=f"class_{label}", ignore_base_fingerprint=True)

    for number in range(count):
        run(number)
    return run


def draw(results: Path, figure: Path) -> None:
    """The curves of a results file as one figure; without matplotlib, says so and draws nothing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f'No figure: {error} (pip install "funlora-hf[bench]")', file=sys.stderr)
        return
    curves = {curve["name"]: curve for curve in read_json(results)["curves"]}
    panels = {
        "Size": ("kB", [name for name in curves if curves[name]["unit"] == "kB"]),
        "Make a class live": ("milliseconds", [name for name in curves if name.endswith("make a class live")]),
        "Add a class": ("milliseconds", [name for name in curves if "add a class" in name or "load a class" in name]),
        "Load all classes": ("milliseconds", [name for name in curves if name.startswith("bank: load")]),
    }
    with rc_context(STYLE), whole_file(figure) as temporary:
        canvas = Figure(figsize=(10, 7.5), layout="constrained")
        for axes, (title, (unit, names)) in zip(canvas.subplots(2, 2).flat, panels.items(), strict=True):
            for name, look in zip(names, LOOKS, strict=False):
                plot(axes, curves[name], **look)
            axes.set(title=title, xlabel="classes", ylabel=unit, xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:,g}")
            axes.grid(visible=True, which="major", alpha=0.3)
            axes.legend()
        canvas.savefig(temporary, dpi=DPI, format="png")


def plot(axes: Any, curve: Mapping[str, Any], **look: str) -> None:
    """A line through the medians, with bars from quartile to quartile."""
    points = curve["points"]
    values = [p["value"] for p in points]
    below, above = [p["value"] - p["low"] for p in points], [p["high"] - p["value"] for p in points]
    counts = [p["classes"] for p in points]
    axes.errorbar(counts, values, yerr=(below, above), capsize=3, **look, label=curve["name"])


if __name__ == "__main__":
    written = main(__doc__, measure, __file__)
    draw(written, FIGURE if written.parent == RESULTS else written.with_suffix(".png"))
