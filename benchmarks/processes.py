"""Classes learned per second on the paper's U-Net by two processes and by one, of one thread each; equal files.

Runs of one process and of two take turns, each started by torchrun. The clock runs from the moment when all processes
stand ready, with the base loaded and one step done, to the moment when the last adapter is on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from backbone import paper_unet
from interleaved import Findings, comparison, main
from tqdm.auto import tqdm

from funlora_hf.adapters.class_folder import ADAPTERS_FOLDER
from funlora_hf.continual.base import find_base, save_base
from funlora_hf.continual.batches import RealImages
from funlora_hf.continual.config import ContinualTrainingArguments, ModelArguments, run_settings
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.continual.strategies.funlora import FunLora
from funlora_hf.continual.strategy import Batch, Setting, Strategy
from funlora_hf.continual.trainer import ContinualTrainer, phase_seconds
from funlora_hf.data.tasks import Task
from funlora_hf.utils.files import folder_sha256, read_json, write_json
from funlora_hf.utils.seeds import generator_for


PROCESSES = 2
CLASSES = 4
STEPS = 4
BATCH_SIZE = 4
SECONDS = "seconds.json"


def measure(rounds: int = 3) -> Findings:
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"1 process": [], f"{PROCESSES} processes": []}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        save_base(paper_unet(), base, range(10), {number: f"base_{number}" for number in range(10)})
        for number in tqdm(range(rounds), desc="processes", leave=False):
            for side in seconds if number % 2 else reversed(seconds):
                output = Path(folder) / f"round_{number}_{side.partition(' ')[0]}"
                seconds[side].append(launch(base, output, int(side.partition(" ")[0])) / CLASSES)
                digests.add(folder_sha256(output / ADAPTERS_FOLDER))
    name = (
        f"classes per second, {PROCESSES} processes / 1, one thread each ({CLASSES} classes of {STEPS} steps with batch "
        f"{BATCH_SIZE}; seconds are those of a class)"
    )
    row = comparison(name, seconds, goal=f">= {0.95 * PROCESSES:.2f}")
    return Findings([row], facts={"adapters of all runs equal to the byte": len(digests) == 1})


def launch(base: Path, output: Path, processes: int) -> float:
    """Seconds that so many processes take to learn all classes.

    Raises:
        RuntimeError: they failed, or did not share the classes evenly.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, __file__, os.fspath(base), os.fspath(output)], env=environment, capture_output=True, text=True
    )
    if ended.returncode:
        raise RuntimeError(f"{processes} processes ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    trained_by = sorted(int(phase["process"]) for phase in phase_seconds(RunFolder(output)).values())
    if trained_by != sorted(number % processes for number in range(CLASSES)):
        raise RuntimeError(f"{processes} processes trained the classes as {trained_by}: they were not shared evenly.")
    return read_json(output / SECONDS)


@dataclass(frozen=True)
class RandomImages:
    """Noise in place of real images, as much of it for every class.

    Args:
        class_names: id -> name.
        image_shape: (channels, height, width).
        per_class: images of a class.
    """

    class_names: dict[int, str]
    image_shape: tuple[int, int, int]
    per_class: int = 4 * BATCH_SIZE

    def images(self, class_id: int) -> torch.Tensor:
        """uint8, `(per_class, channels, height, width)`."""
        shape = (self.per_class, *self.image_shape)
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator_for(0, "images", class_id))


def work(base_folder: Path, output: Path) -> None:
    """One process of a run: learns its share of the classes."""
    accelerator = Accelerator()
    base = find_base(os.fspath(base_folder))
    known = len(base.classes)
    classes = tuple(range(known, known + CLASSES))
    data = RandomImages(
        {class_id: f"class_{class_id}" for class_id in classes}, (base.channels, base.image_size, base.image_size)
    )
    tasks = [Task(0, tuple(base.classes)), Task(1, classes)]
    training = ContinualTrainingArguments(
        output_dir=os.fspath(output), adapter_train_steps=STEPS, adapter_batch_size=BATCH_SIZE
    )
    folder = RunFolder(output)
    setting = Setting(
        output_dir=output,
        base_dir=base.folder,
        base_source=base.source,
        has_base=True,
        class_names={**base.classes, **data.class_names},
        tasks=tuple(tasks),
        model=ModelArguments(base_model=os.fspath(base_folder)),
        image_shape=(base.channels, base.image_size),
        training=training,
        device=accelerator.device,
    )
    strategy = FunLora(setting)
    trainer = ContinualTrainer(
        strategy, RealImages(data, training, accelerator.device), folder=folder, accelerator=accelerator
    )
    if accelerator.is_main_process:
        folder.open(run_settings(training), overwrite=False, resume=False)
    warm_up(strategy, tasks[1], data)
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    trainer.train()  # returns when all processes are done
    if accelerator.is_main_process:
        write_json(output / SECONDS, time.perf_counter() - started)
    accelerator.end_training()


def warm_up(strategy: Strategy, task: Task, data: RandomImages) -> None:
    """Load the base and run forward and backward once."""
    phase = next(iter(strategy.phases(task)))
    trainable = strategy.build(phase)
    size = phase.settings.batch_size
    sample = torch.randn(size, *data.image_shape)
    batch = Batch(sample, torch.tensor(phase.class_ids).expand(size), torch.randn_like(sample), torch.rand(size))
    strategy.training_step(phase, batch, trainable.module).mean().backward()
    strategy.release_phase(phase, trainable)


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        work(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        main(__doc__, measure, __file__)
