"""Runs the variants of an ablation over seeds, on one base per seed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ablation.variants import REFERENCE, Variant
from comparison.bases import check_seeds, run_on_shared_bases
from comparison.jobs import Job, with_changes
from comparison.learning_rates import RATES_FILE, Candidate, check_rates, rates_record, search_learning_rates
from funlora_hf.adapters.class_folder import ADAPTERS_FOLDER, adapter_folders
from funlora_hf.layer_selection import layer_importance, select_layers
from funlora_hf.run import RunArguments
from funlora_hf.tuner.learning_rates import alpha_rate
from funlora_hf.utils.checks import check_at_least_one
from funlora_hf.utils.field_types import check_field_types
from funlora_hf.utils.files import read_mapping, write_json
from funlora_hf.utils.locks import folder_lock


@dataclass
class AblationArguments:
    """What to run, and how often."""

    tables: list[str] = field(
        default_factory=lambda: ["functions", "operations", "ratio", "layers", "rivals", "solvers"],
        metadata={"help": "Tables to make."},
    )
    variants: list[str] | None = field(
        default=None, metadata={"help": "Only these rows, by the names of their folders; None: all of the tables."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds, one base for each."})
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Choose each variant's adapter_learning_rate among these, and beyond them where the best is at the edge: on "
            "the first seed and the first new task, by the flow-matching loss on a fifth of the training images, held out. None: "
            "the recipe's for all."
        },
    )
    alpha_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Choose each variant's adapter_alpha_rate among these, together with its learning rate; adapters without alpha "
            "keep 1. None: the recipe's for all."
        },
    )
    num_workers: int = field(default=1, metadata={"help": "Runs at a time."})

    def __post_init__(self) -> None:
        check_field_types(self)
        check_at_least_one("num_workers", self.num_workers)
        check_seeds(self.seeds)
        check_rates(self.learning_rates)
        check_rates(self.alpha_rates, "alpha_rates")
        if self.alpha_rates and not self.learning_rates:
            raise ValueError(
                f"`alpha_rates` is {self.alpha_rates} without `learning_rates`, expected both, since the best rate of each multiple is "
                "compared: add --learning_rates, such as 1e-2 2e-2 4e-2."
            )


def run_ablation(
    ablation: AblationArguments, reference: RunArguments, variants: Sequence[Variant]
) -> dict[str, list[dict[str, Any] | None]]:
    """
    Run every variant with every seed; what is finished is not run again.

    Args:
        ablation ([`AblationArguments`]): seeds, rates, workers.
        reference ([`RunArguments`]): the reference run; its `output_dir` is the folder of the ablation.
        variants: in an order in which each comes after what it needs.

    Returns:
        `dict`: key of the variant -> results of its runs, a seed each; None for a run that failed, whose log says why.

    Raises:
        RuntimeError: no learning rate works for one of the variants.
        FolderInUseError: another ablation is at work in `output_dir`.
    """
    output_dir = Path(reference.training.output_dir)
    with folder_lock(output_dir):
        return _run_variants(ablation, reference, variants, output_dir)


def _run_variants(
    ablation: AblationArguments, reference: RunArguments, variants: Sequence[Variant], output_dir: Path
) -> dict[str, list[dict[str, Any] | None]]:
    chosen = _chosen_rates(ablation, reference, variants, output_dir)
    results: dict[str, list[dict[str, Any] | None]] = {}
    for wave in _waves(variants):
        jobs = []
        for variant in wave:
            for seed in ablation.seeds:
                rates = chosen.get(variant.rate_of or variant.key, {})
                jobs.append(_job(reference, variant, seed, rates, output_dir))
        outcomes = run_on_shared_bases(jobs, output_dir / "bases", ablation.num_workers, description="runs")
        done = iter([outcome.results for outcome in outcomes])
        for variant in wave:
            results[variant.key] = [next(done) for _ in ablation.seeds]
    return results


def _waves(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Variants that can run side by side, one wave after another."""
    first = [variant for variant in variants if not variant.reuses_adapters and variant.needs is None]
    second = [variant for variant in variants if variant not in first]
    return [wave for wave in (first, second) if wave]


def _job(reference: RunArguments, variant: Variant, seed: int, rates: Mapping[str, float], output_dir: Path) -> Job:
    runs = output_dir / f"seed_{seed}"
    folder = runs / variant.key
    changes = {"seed": seed, "output_dir": os.fspath(folder), **variant.changes, **rates}
    model = {**vars(reference.model), **variant.changes}
    if alpha_rate(model["peft_method"], model["function"]) is None:
        # A run refuses a rate of what its adapters do not have.
        changes["adapter_alpha_rate"] = 1.0
    if variant.needs is not None:
        changes["target_modules"] = _most_important(runs, variant.needs)
    adapters = runs / REFERENCE / ADAPTERS_FOLDER if variant.reuses_adapters else None
    return Job(with_changes(reference, changes), folder, f"{variant.label}, seed {seed}", adapters)


def _most_important(runs: Path, needed: str) -> list[str]:
    """The most important layers, for as many numbers per class as the reference takes."""
    results = read_mapping(runs / REFERENCE / "results.json", keys=["parameters_per_class", "settings"])
    base = results["settings"]["ModelArguments"]["base_model"] or runs / REFERENCE / "base"
    with torch.device("meta"):
        unet = UNet2DModel.from_config(UNet2DModel.load_config(base, subfolder="unet"))
    importance = layer_importance(adapter_folders(runs / needed / ADAPTERS_FOLDER))
    budget = results["parameters_per_class"]
    return select_layers(unet, f"<= {budget}", importance=importance)


def _chosen_rates(
    ablation: AblationArguments, reference: RunArguments, variants: Sequence[Variant], output_dir: Path
) -> dict[str, dict[str, float]]:
    """The best rates of every variant that has its own, as arguments of its runs; `learning_rates.json` has them as "pairs"."""
    if ablation.learning_rates is None:
        return {}
    of_variant = {
        variant.key: _candidates(ablation, reference, variant, output_dir)
        for variant in variants
        if variant.rate_of is None
    }
    candidates = [candidate for group in of_variant.values() for candidate in group]
    scores = search_learning_rates(candidates, ablation.learning_rates, output_dir, ablation.num_workers)
    pairs = {}
    for key, group in of_variant.items():
        best = min(group, key=lambda candidate: min(scores[candidate.key].losses.values()))
        alpha_rate = best.arguments.training.adapter_alpha_rate
        pairs[key] = {"adapter_learning_rate": scores[best.key].best, "adapter_alpha_rate": alpha_rate}
    write_json(output_dir / RATES_FILE, {**rates_record(candidates, scores), "pairs": pairs})
    return pairs


def _candidates(
    ablation: AblationArguments, reference: RunArguments, variant: Variant, output_dir: Path
) -> list[Candidate]:
    """What the best rate of a variant is chosen among: one for each multiple of alpha's rate, or a single one."""
    arguments = _job(reference, variant, ablation.seeds[0], {}, output_dir).arguments
    if not ablation.alpha_rates or alpha_rate(arguments.model.peft_method, arguments.model.function) is None:
        return [Candidate(variant.key, variant.label, arguments)]
    return [
        Candidate(
            f"{variant.key}_alpha_{multiple:g}",
            f"{variant.label}, alpha's rate times {multiple:g}",
            with_changes(arguments, {"adapter_alpha_rate": multiple}),
        )
        for multiple in sorted(set(ablation.alpha_rates))
    ]
