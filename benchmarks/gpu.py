"""What FunLoRA costs on one GPU: training steps, functional matrices, sampling, banks, and how long a recipe will take.

Every measurement is on the paper's U-Net, in float32 (with TF32 in convolutions, as torch does by default) and, where it makes
sense, under bfloat16 autocast with channels_last, training compiled block by block. Results are written after each of them, and
none is begun when `--minutes` are over; the exit code is 1 if one has failed. `--device cpu --small` runs all of it on
toys: a test of this file, no measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from adapter_bank import filled, switch
from backbone import adapted, batch, floor, paper_unet
from diffusers import UNet2DModel
from functional_matrix import Case, plain, tensors
from interleaved import RESULTS, Comparison, bytes_saved, compare, environment, table
from torch import nn

from funlora_hf import AdapterBank, cached_weights, functional_matrix, mixed_batch
from funlora_hf.continual.base import BASE_PHASE
from funlora_hf.continual.batches import RealImages
from funlora_hf.continual.compilation import compile_blocks
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategies.funlora import FunLora
from funlora_hf.continual.strategy import Phase, Setting
from funlora_hf.continual.trainer import ContinualTrainer
from funlora_hf.data.image_data import load_image_data
from funlora_hf.data.tasks import Task
from funlora_hf.run import RunArguments
from funlora_hf.train import parse
from funlora_hf.utils.files import write_json


FAST_RECIPE = "cifar10_fast"
CIFAR10_CLASSES, CIFAR10_IMAGES = 10, 5000
NOT_BEGUN = "not begun: time is over"


@dataclass(frozen=True)
class Size:
    """How large everything is; the defaults are what is claimed.

    Args:
        unet: arguments of UNet2DModel; None: the paper's.
        batch: images in a step.
        mixture: classes in a mixed batch.
        many: classes in a bank, and `few` in one to compare it with.
        few: see `many`.
        matrix: shape of a functional matrix.
        rounds: turns of a comparison.
        calls: in a turn, of what takes milliseconds; of what takes microseconds, ten times as many.
        steps: of a phase of the recipe; a fifth of them first, which do not count.
        recipe: what is changed in the recipe.
    """

    unet: dict[str, Any] | None = None
    batch: int = 128
    mixture: int = 20
    many: int = 1000
    few: int = 10
    matrix: tuple[int, int] = (256, 512)
    rounds: int = 7
    calls: int = 3
    steps: int = 150
    recipe: tuple[str, ...] = ()


_TOY_UNET = {
    "sample_size": 32,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
SMALL = Size(
    unet=_TOY_UNET,
    batch=6,
    mixture=3,
    many=20,
    few=2,
    matrix=(16, 24),
    rounds=2,
    calls=1,
    steps=5,
    recipe=(
        *("--unet_config", json.dumps(_TOY_UNET), "--base_batch_size", "4", "--adapter_batch_size", "4"),
        *("--sampling_batch_size", "4", "--num_inference_steps", "2", "--torch_compile", "False"),
    ),
)


@dataclass(frozen=True)
class Mode:
    """In which numbers, and how laid out, models run.

    Args:
        name: for the rows.
        low: bfloat16 autocast and channels_last.
        compiled: blocks are compiled.
    """

    name: str
    low: bool = False
    compiled: bool = False


FLOAT32 = Mode("float32")
LOW = Mode("bfloat16, channels_last", low=True)
LOW_COMPILED = Mode("bfloat16, channels_last, compiled", low=True, compiled=True)


@dataclass
class Benchmark:
    """
    Args:
        device: where.
        size: how large.
        data: images of CIFAR-10 for the recipe, as continual_train.py takes them; None: random ones.
        backend: of torch.compile.
        rows: ratios, as measured so far.
        figures: other numbers: `{"name", "values": {side: number}, "unit", "goal"}`.
        estimate: how long the recipe will take, line by line.
    """

    device: torch.device
    size: Size
    data: str | None
    backend: str
    rows: list[Comparison] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    estimate: list[str] = field(default_factory=list)

    def measurements(self) -> dict[str, Callable[[], None]]:
        """All that can be measured, by name, in the order of what is missed least if time runs out."""
        found: dict[str, Callable[[], None]] = {
            "functional matrix": self.functional_matrix,
            "memory of the functional matrix": self.saved_bytes,
            "training step, float32": partial(self.training_step, FLOAT32),
            "the recipe's phases": self.recipe,
            "training step, bfloat16 compiled": partial(self.training_step, LOW_COMPILED),
            "forward, float32": partial(self.forward, FLOAT32),
            "forward, bfloat16": partial(self.forward, LOW),
            "bank": self.bank,
            "mixed forward, float32": partial(self.mixed_forward, FLOAT32),
            "mixed step, float32": partial(self.mixed_step, FLOAT32),
            "mixed forward, bfloat16": partial(self.mixed_forward, LOW),
            "mixed step, bfloat16": partial(self.mixed_step, LOW),
        }
        return found

    def training_step(self, mode: Mode) -> None:
        """FunLoRA against the floor, and against all weights: forward, backward and Adam."""
        size = self.size.batch
        ours = self._step(adapted(self._unet(mode), "x"), mode)
        for other, model, goal in (
            ("floor", floor(self._unet(mode)), "<= 1.05"),
            ("all weights", self._unet(mode), "<= 0.80"),
        ):
            name = f"training step, FunLoRA / {other}, batch {size}, {mode.name}"
            self._compare(name, {"FunLoRA": ours, other: self._step(model, mode)}, goal=goal)

    def functional_matrix(self) -> None:
        """F and its gradients: ours, and torch.compile of it, against the plain formula."""
        inputs, gradient = self._factors()
        ways = {
            "functional_matrix": functional_matrix,
            "torch.compile": torch.compile(functional_matrix, backend=self.backend, dynamic=False),
        }

        def run(compute: Callable[..., torch.Tensor]) -> None:
            torch.autograd.grad(compute(*inputs, function="cosine"), inputs, gradient)

        for name, compute in ways.items():
            sides = {name: partial(run, compute), "plain": partial(run, plain)}
            title = f"F forward and backward, {self.size.matrix}, p = 10: {name} / plain formula"
            self._compare(title, sides, calls=10 * self.size.calls, goal="<= 0.45")

    def saved_bytes(self) -> None:
        """What F keeps for its backward."""
        inputs, _ = self._factors()
        compiled = torch.compile(functional_matrix, backend=self.backend, dynamic=False)
        ways = {"plain": plain, "ours": functional_matrix, "compiled": compiled}
        values = {
            name: bytes_saved(lambda compute=compute: compute(*inputs, function="cosine"))
            for name, compute in ways.items()
        }
        self._figure(f"saved for backward by F, {self.size.matrix}, p = 10", values, "bytes")

    def forward(self, mode: Mode) -> None:
        """One adapter in evaluation against the base."""
        size = self.size.batch
        base, model = self._unet(mode).eval(), adapted(self._unet(mode), "x").eval()
        with torch.no_grad(), cached_weights(model):
            sides = {"one adapter": self._forward(model, mode), "base": self._forward(base, mode)}
            self._compare(f"forward, one adapter / base, batch {size}, {mode.name}", sides, goal="<= 1.01")

    def mixed_forward(self, mode: Mode) -> None:
        """Many classes in a batch against one, both with their weights kept."""
        many, one, name = self._mixture(mode)
        with torch.no_grad(), ExitStack() as contexts:
            sides = {}
            for side, (model, names) in {f"{self.size.mixture} classes": many, "one class": one}.items():
                contexts.enter_context(mixed_batch(model.eval(), names))
                sides[side] = self._forward(model, mode)
            self._compare(f"forward, {name}, {mode.name}", sides, goal="<= 1.15")

    def mixed_step(self, mode: Mode) -> None:
        """The same as a training step."""
        many, one, name = self._mixture(mode)
        sides = {}
        for side, (model, names) in {f"{self.size.mixture} classes": many, "one class": one}.items():
            model.set_requires_grad(list(dict.fromkeys(names)))
            sides[side] = self._step(model, mode, partial(mixed_batch, model, names))
        self._compare(f"training step, {name}, {mode.name}", sides, goal="<= 1.30")

    def bank(self) -> None:
        """Making a class live, and loading all of them."""
        many, few = (filled(count, self._unet(FLOAT32)) for count in (self.size.many, self.size.few))
        names = {bank: f"{len(bank):,} classes" for bank in (many, few)}
        sides = {name: switch(bank) for bank, name in names.items()}
        title = f"AdapterBank.activate, of {names[many]} / of {names[few]}"
        self._compare(title, sides, calls=10 * self.size.calls, goal="1, at <= 0.2 ms")
        with tempfile.TemporaryDirectory() as folder:
            sides = {}
            for bank, name in names.items():
                file = Path(folder) / f"{len(bank)}.safetensors"
                bank.save(file)
                sides[name] = partial(AdapterBank.load, file, bank.model)
            self._compare(f"AdapterBank.load, {names[many]} / {names[few]}", sides, goal="<= 20 ms")

    def recipe(self) -> None:
        """Steps a second in the real loop with the settings of cifar10_fast.yaml, and samples a second."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = self._recipe_arguments(Path(folder) / "out")
            strategy = self._train(arguments, Path(folder) / "out")
            rates = {name: measured.rate for name, measured in strategy.phases_measured.items()}
            self._figure("steps a second in the recipe's loop", rates, "1/s")
            waits = {name: measured.first for name, measured in strategy.phases_measured.items()}
            self._figure("from the start of a phase to its first step, with compilation", waits, "s")
            sampling = self._sampling_rate(strategy, arguments)
        self._figure("images sampled a second, as the recipe does", {"float32": sampling}, "1/s")
        adapter = [rate for name, rate in rates.items() if name != BASE_PHASE]
        self.estimate = estimate(arguments, rates[BASE_PHASE], sum(adapter) / len(adapter), sampling)

    def _recipe_arguments(self, output_dir: Path) -> RunArguments:
        return parse(
            [
                *("--config", FAST_RECIPE, "--output_dir", str(output_dir)),
                *("--dataset_name", self.data or "random"),
                *self.size.recipe,
            ]
        )

    def _train(self, arguments: RunArguments, folder: Path) -> Timed:
        """The first two tasks, a few steps of each phase."""
        arguments.training.max_train_steps = self.size.steps
        data = RandomImages() if self.data is None else load_image_data(self.data, image_size=32, channels=3)
        names = dict(itertools.islice(data.class_names.items(), 4))
        tasks = [Task(0, tuple(names)[:2]), Task(1, tuple(names)[2:])]
        accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision=arguments.training.mixed_precision)
        setting = Setting(
            output_dir=folder,
            base_dir=folder / "base",
            base_source="base/unet",
            has_base=False,
            class_names=names,
            tasks=tuple(tasks),
            model=arguments.model,
            image_shape=(arguments.model.unet.get("in_channels", 3), arguments.model.unet["sample_size"]),
            training=arguments.training,
            device=accelerator.device,
        )
        strategy = Timed(setting)
        strategy.check()
        ContinualTrainer(
            strategy,
            RealImages(data, arguments.training, accelerator.device, random_flip=arguments.data.random_flip),
            folder=RunFolder(folder),
            accelerator=accelerator,
        ).train()
        return strategy

    def _sampling_rate(self, strategy: FunLora, arguments: RunArguments) -> float:
        how, class_id = arguments.evaluation, strategy.setting.tasks[1].class_ids[0]
        with strategy.inference([class_id]) as pipe:
            sample = partial(pipe, [class_id] * how.sampling_batch_size, solver=how.solver, output_type="pt")
            sample(num_inference_steps=1)
            wait_for(self.device)
            started = time.perf_counter()
            sample(num_inference_steps=how.num_inference_steps)
            wait_for(self.device)
        return how.sampling_batch_size / (time.perf_counter() - started)

    def _unet(self, mode: Mode) -> UNet2DModel:
        unet = paper_unet() if self.size.unet is None else UNet2DModel(**self.size.unet, num_class_embeds=10)
        unet.to(self.device)
        if mode.low:
            unet.to(memory_format=torch.channels_last)
        if mode.compiled:
            compile_blocks(unet, backend=self.backend)
        return unet

    def _mixture(self, mode: Mode) -> tuple[tuple[nn.Module, list[str]], tuple[nn.Module, list[str]], str]:
        """Two models with the adapter of each sample: of many classes, and of one."""
        size, classes = self.size.batch, [f"class_{number}" for number in range(self.size.mixture)]
        # As pipeline and trainer have them: sorted by class.
        mixed = sorted(classes[sample % len(classes)] for sample in range(size))
        many, one = adapted(self._unet(mode), *classes), adapted(self._unet(mode), "x")
        return (many, mixed), (one, ["x"] * size), f"{len(classes)} classes in a batch of {size} / one class"

    def _factors(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What F is made of, and a gradient of F."""
        made = tensors(Case("cosine", self.size.matrix))
        inputs = [tensor.detach().to(self.device).requires_grad_() for tensor in made]
        return inputs, torch.randn(self.size.matrix, device=self.device)

    def _inputs(self, mode: Mode) -> dict[str, torch.Tensor]:
        inputs = {name: tensor.to(self.device) for name, tensor in batch(self.size.batch).items()}
        if mode.low:
            inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
        return inputs

    def _autocast(self, mode: Mode) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if mode.low else nullcontext()

    def _forward(self, model: nn.Module, mode: Mode) -> Callable[[], None]:
        inputs = self._inputs(mode)

        def run() -> None:
            with self._autocast(mode):
                model(**inputs)

        return run

    def _step(
        self, model: nn.Module, mode: Mode, context: Callable[[], AbstractContextManager] = nullcontext
    ) -> Callable[[], None]:
        model.train()
        inputs, target = self._inputs(mode), torch.randn_like(batch(self.size.batch)["sample"]).to(self.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-4, fused=True if self.device.type == "cuda" else None)

        def run() -> None:
            with context():
                with self._autocast(mode):
                    loss = nn.functional.mse_loss(model(**inputs).sample.float(), target)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def _compare(
        self, name: str, sides: dict[str, Callable[[], object]], *, calls: int | None = None, goal: str = ""
    ) -> None:
        # Compiles, chooses algorithms and fills the allocator.
        for side in sides.values():
            side()
        self.rows.append(compare(name, sides, rounds=self.size.rounds, calls=calls or self.size.calls, goal=goal))

    def _figure(self, name: str, values: dict[str, float], unit: str, goal: str = "") -> None:
        self.figures.append({"name": name, "values": values, "unit": unit, "goal": goal})


@dataclass
class PhaseTime:
    """
    Args:
        started: when the phase was built.
        first: seconds until its first step was over.
        rate: steps a second after the first fifth.
    """

    started: float
    first: float = math.nan
    rate: float = math.nan


class Timed(FunLora):
    """Looks at the clock while it trains, seldom enough not to hold the device up."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.phases_measured: dict[str, PhaseTime] = {}
        self._step = 0
        self._warm = 0.0

    def build(self, phase: Phase) -> Any:
        self._step = 0
        self.phases_measured[phase.name] = PhaseTime(time.perf_counter())
        return super().build(phase)

    def after_step(self, phase: Phase) -> None:
        self._step += 1
        total = self.setting.training.max_train_steps
        warm_up = max(1, total // 5)
        if self._step not in (1, warm_up, total):
            return
        wait_for(self.setting.device)
        now, measured = time.perf_counter(), self.phases_measured[phase.name]
        if self._step == 1:
            measured.first = now - measured.started
        if self._step == warm_up:
            self._warm = now
        if self._step == total:
            measured.rate = (total - warm_up) / (now - self._warm)


class RandomImages:
    """As many images of as many classes as CIFAR-10 has for training, without anything to see."""

    class_names = {label: f"class {label}" for label in range(CIFAR10_CLASSES)}  # noqa: RUF012 - as ImageClassificationData

    def images(self, class_id: int, *, split: str = "train") -> torch.Tensor:
        generator = torch.Generator().manual_seed(class_id)
        return torch.randint(0, 256, (CIFAR10_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)


def estimate(arguments: RunArguments, base_rate: float, adapter_rate: float, sampling_rate: float) -> list[str]:
    """How long the recipe will take on CIFAR-10, as arithmetic to be read.

    Args:
        arguments: of the recipe.
        base_rate: optimiser steps a second of the base's phase.
        adapter_rate: the same of a class's phase.
        sampling_rate: images a second.
    """
    training, first = arguments.training, arguments.data.classes_per_task
    later = CIFAR10_CLASSES - first
    base = training.base_epochs * math.ceil(first * CIFAR10_IMAGES / training.base_batch_size)
    adapter = training.adapter_epochs * math.ceil(CIFAR10_IMAGES / training.adapter_batch_size)
    samples = CIFAR10_CLASSES * arguments.evaluation.num_samples_per_class
    parts = [
        (f"base: {base} steps / {base_rate:.3g} a second", base / base_rate),
        (f"classes: {later} x {adapter} steps / {adapter_rate:.3g} a second", later * adapter / adapter_rate),
        (f"sampling: {samples} images / {sampling_rate:.3g} a second", samples / sampling_rate),
    ]
    lines = [f"{text} = {seconds:.0f} s" for text, seconds in parts]
    total = sum(seconds for _, seconds in parts)
    pieces = (
        f", pieces of {training.time_limit_minutes:g} minutes: {math.ceil(total / 60 / training.time_limit_minutes)}"
    )
    return [*lines, f"together {total:.0f} s = {total / 60:.1f} minutes, without classifiers and compilation{pieces}"]


def wait_for(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(benchmark: Benchmark, *, minutes: float, started: float) -> Iterator[dict[str, str]]:
    """Measure one thing after the other; after each, what is missing so far and why."""
    missing = dict.fromkeys(benchmark.measurements(), NOT_BEGUN)
    for name, run in benchmark.measurements().items():
        if time.monotonic() - started >= 60 * minutes:
            break
        print(f"{time.monotonic() - started:5.0f} s  {name}", file=sys.stderr)
        try:
            run()
            del missing[name]
        except Exception as error:
            # One that fails must not cost the others on a machine that is lent for minutes; it is named in the results.
            missing[name] = f"{type(error).__name__}: {error}"
            print(f"failed: {missing[name]}", file=sys.stderr)
        torch._dynamo.reset()
        if benchmark.device.type == "cuda":
            torch.cuda.empty_cache()
        yield missing
    yield missing


def report(benchmark: Benchmark, missing: dict[str, str]) -> str:
    """Everything as Markdown."""
    lines = [table(benchmark.rows), "", "| what | values | goal |", "|---|---|---|"]
    for figure in benchmark.figures:
        values = ", ".join(f"{side}: {value:.4g} {figure['unit']}" for side, value in figure["values"].items())
        lines.append(f"| {figure['name']} | {values} | {figure['goal']} |")
    lines += ["", "cifar10_fast.yaml:", *benchmark.estimate] if benchmark.estimate else []
    lines += ["", "missing:", *(f"{name}: {why}" for name, why in missing.items())] if missing else []
    return "\n".join(lines)


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="Where (default: cuda).")
    parser.add_argument("--small", action="store_true", help="Toys, to see whether it runs.")
    parser.add_argument("--data", help="CIFAR-10's training images as a parquet file; default: random images.")
    parser.add_argument("--minutes", type=float, default=8.5, help="Begin nothing after this time (default: 8.5).")
    parser.add_argument(
        "--output_dir", type=Path, help="Where the JSON goes (default: results/ of a GPU's, not small)."
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU: --device cpu --small --output_dir FOLDER runs everything on toys")
    measures = arguments.device == "cuda" and not arguments.small
    if arguments.output_dir is None and not measures:
        parser.error("what is measured on a CPU or on toys is no result: name a folder for it by --output_dir")
    if arguments.output_dir is not None and not measures and arguments.output_dir.resolve() == RESULTS.resolve():
        parser.error(f"--output_dir is {arguments.output_dir}, where results of GPUs go: name another folder")
    torch.manual_seed(0)
    benchmark = Benchmark(
        torch.device(arguments.device),
        SMALL if arguments.small else Size(),
        arguments.data,
        backend="eager" if arguments.small else "inductor",
    )
    output_dir = arguments.output_dir or RESULTS
    about = {"benchmark": "gpu", "about": (__doc__ or "").splitlines()[0], **environment()}
    missing: dict[str, str] = {}
    for missing in measure(benchmark, minutes=arguments.minutes, started=started):
        record = {
            **about,
            "device": arguments.device,
            "small": arguments.small,
            "seconds": time.monotonic() - started,
            "rows": [asdict(row) for row in benchmark.rows],
            "figures": benchmark.figures,
            "estimate": benchmark.estimate,
            "missing": missing,
        }
        write_json(output_dir / "gpu.json", record)
    print(report(benchmark, missing))
    if set(missing.values()) - {NOT_BEGUN}:
        sys.exit(1)


if __name__ == "__main__":
    main()
