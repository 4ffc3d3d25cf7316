"""Made-up comparisons: results as runs write them, without running any."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from comparison.choices import Choice
from comparison.jobs import Outcome
from comparison.runner import Compared
from funlora_hf.continual.run_folder import RunFolder
from funlora_hf.evaluation.report import accuracy_results


NAMES = (
    *("funlora", "frozen", "joint", "finetune", "naive_lora", "merge_init", "merge_orthogonal"),
    *(
        "magmax",
        "replay",
        "guide",
        "merge_orthogonal (merge=svd, orthogonal=released)",
        "magmax (batch)",
        "replay (few)",
    ),
)
GROWING = ("funlora", "frozen")
REPLAYING = ("replay", "guide", "replay (few)")


def made_up_results(name: str, seed: int, *, tasks: int = 5) -> dict:
    """Results of a run on digits, two classes a task, in which old tasks fade as the name has it."""
    generator = np.random.default_rng([*map(ord, name), seed])
    fading = {"funlora": 0.01, "frozen": 0.02, "joint": 0.01, "finetune": 0.8, "replay": 0.12}.get(name, 0.3)
    best = 97 if name != "frozen" else 62
    matrix = [
        [float(np.clip(best * (1 - fading) ** (t - j) + generator.normal(0, 2), 0, 100)) for j in range(t + 1)]
        for t in range(tasks)
    ]
    replays, grows = name in REPLAYING, name in GROWING
    seconds = [60.0 + generator.normal()] + [20 + 12.0 * t * replays + generator.normal() for t in range(1, tasks)]
    kept = [2_620_000 + 15_000 * t * grows + 2_620_000 * replays for t in range(tasks)]
    if name == "joint":
        seconds = [150.0] + [0.0] * (tasks - 1)
    classes = list(range(2 * tasks))
    return {
        "strategy": name.split()[0],
        "dataset": "digits",
        "seed": seed,
        "tasks": [classes[2 * t : 2 * t + 2] for t in range(tasks)],
        "class_order": classes,
        "class_names": {str(c): str(c) for c in classes},
        **accuracy_results(matrix),
        "held_out_loss": {"mean": 0.3 + 0.1 * generator.random(), "per_class": {}},
        "image_quality": {
            "extractor": "cnn",
            "frechet_distance": 8 + 4 * generator.random(),
            "precision": 0.8 + 0.1 * generator.random(),
            "recall": 0.7 + 0.1 * generator.random(),
        },
        "seconds": {"training": sum(seconds), "training_per_task": seconds, "sampling": 4.5, "classifier": 3.0},
        "training_images_per_task": [22_400] + [9_600] * (tasks - 1),
        "nfe": 12,
        "memory": {"persistent": kept[-1], "transient": 18_000},
        "memory_per_task": [{"persistent": value, "transient": 18_000} for value in kept],
        "parameters_per_class": 1036 if name == "funlora" else None,
        "parameters_per_class_with_vector": 1164 if name == "funlora" else None,
        "own_classifier": accuracy_results(matrix) if replays else None,
        "settings": {},
        "versions": {"funlora-hf": "0.1.0", "torch": "2.13.0"},
        "environment": {"python": "3.11.7", "device": "cpu", "num_processes": 1, "num_threads": 1},
    }


def made_up_samples(folder: Path, name: str, *, tasks: int = 5, channels: int = 1, size: int = 8) -> None:
    """A run's first samples: a bright square that fades into noise as tasks go by."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    tensors = {}
    for t in range(tasks):
        for class_id in range(2 * t + 2):
            noise = torch.randint(0, 256, (8, channels, size, size), generator=generator)
            shape = torch.zeros(8, channels, size, size)
            shape[..., 1 + class_id % 2 : size // 2 + 2, 2 : size - 2] = 255
            share = 1.0 if name in ("funlora", "joint") else 0.75 ** (t - class_id // 2)
            tensors[f"task_{t + 1}/class_{class_id}"] = (share * shape + (1 - share) * noise).to(torch.uint8)
    path = RunFolder(folder).samples
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def made_up_comparison(
    folder: Path,
    names: tuple[str, ...] = NAMES[:3],
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    tasks: int = 5,
    failed: tuple[tuple[str, int], ...] = (),
) -> list[Compared]:
    """What `run_comparison` would return; (strategy, seed) in `failed` have no results."""
    compared = []
    for name in names:
        key = name.replace(" ", "_")
        folders = tuple(folder / f"seed_{seed}" / key for seed in seeds)
        outcomes = []
        for seed, path in zip(seeds, folders, strict=True):
            if (name, seed) in failed:
                outcomes.append(Outcome(error=f"ValueError: <{name}> & seed {seed} went wrong"))
            else:
                outcomes.append(Outcome(results=made_up_results(name, seed, tasks=tasks)))
                made_up_samples(path, name, tasks=tasks)
        choice = Choice(name.split()[0], {}, {}, name, key)
        compared.append(Compared(choice, seeds, tuple(outcomes), folders))
    return compared


def concept_results(own, end, **other):
    """Results of a run of two concepts with one score."""
    score = {
        "matrix": [[own], [end, own]],
        "own": own,
        "end": (own + end) / 2,
        "forgetting": own - end,
        "drop": own - end,
    }
    return {
        "strategy": "lora",
        "scores": {"attr": score},
        "floor": {"attr": 0.3},
        "ceiling": {"attr": 1.0},
        "numbers_per_concept": 1356,
        "bytes_kept": 2000,
        "seconds": {"training": 12.4},
        "base_drift": {
            "before": {"shape": 0.99},
            "after_task": [{"shape": 0.5, "change": 0.25}, None],
            "with_concept": {"a": {"shape": 0.5, "change": 0.2}, "b": {"shape": 0.7, "change": 0.4}},
        },
        "pairs": [
            {"prompt": "a and b", "scores": {"a": {"attr": 0.1, "whole": 0.25}, "b": {"attr": 0.3, "whole": 0.75}}}
        ],
        "zero_forgetting": {"identical": None},
        "details": {},
        **other,
    }
