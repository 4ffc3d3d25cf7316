"""Measures the adapters of finished runs: rank of F, alpha and omega, importance of the layers.

    python examples/analyze_adapters.py outputs/digits outputs/digits_power --output_dir outputs/analysis

Writes ranks.json, coefficients.json and figures, and prints a table: the paper's Figure 4 (rank by layer) and Figure 5
(alpha and omega by layer), beside the importance of Figure 3. Reads run folders; runs no model.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from adapter_figures import coefficients_by_layer, rank_by_layer
from seed_tables import markdown_table

from funlora_hf import FunLoraConfig, functional_matrix, initial_alpha, layer_importance, numerical_rank
from funlora_hf.adapters.class_folder import ADAPTERS_FOLDER, adapter_folders
from funlora_hf.evaluation.figures import layer_importance as layer_importance_figure
from funlora_hf.evaluation.report import execution_order
from funlora_hf.layer_selection import LayerImportance, layers_of_state_dict
from funlora_hf.tuner.functional import default_omega
from funlora_hf.utils.files import read_mapping, read_tensors, write_json


@dataclass(frozen=True)
class AdapterMeasures:
    """One adapter, layer by layer.

    Args:
        settings: its configuration.
        rank: layer name -> numerical rank of F; with "mul-add", of the factor, not of the added G.
        alpha: layer name -> its p numbers; empty for a function without alpha.
        omega: layer name -> its p numbers; empty where omega is not learned.
    """

    settings: FunLoraConfig
    rank: dict[str, int]
    alpha: dict[str, list[float]]
    omega: dict[str, list[float]]


@dataclass(frozen=True)
class RunMeasures:
    """The adapters of a run, which share one configuration.

    Args:
        path: folder of the run.
        layers: names of the adapted layers, in order of execution.
        adapters: folder name (`class_<id>`) -> measures.
        importance: see `layer_importance`.
        held_out_loss: folder name -> held-out flow-matching loss of the class; empty if the run has no results.
    """

    path: Path
    layers: list[str]
    adapters: dict[str, AdapterMeasures]
    importance: dict[str, LayerImportance]
    held_out_loss: dict[str, float]

    @property
    def settings(self) -> FunLoraConfig:
        """The configuration that the adapters share."""
        return next(iter(self.adapters.values())).settings

    def rank_by_layer(self) -> dict[str, tuple[float, float]]:
        """Layer name -> mean and standard deviation (of the population) of the rank over the classes."""
        return {layer: _mean_and_std([a.rank[layer] for a in self.adapters.values()]) for layer in self.layers}

    def coefficients_by_layer(self, name: str) -> dict[str, list[tuple[float, float]]]:
        """Layer name -> mean and standard deviation over the classes of each of the p coefficients.

        Args:
            name: "alpha" or "omega".

        Returns:
            Empty if the adapters do not learn this coefficient.
        """
        per_class = [getattr(adapter, name) for adapter in self.adapters.values()]
        if not per_class[0]:
            return {}
        return {
            layer: [_mean_and_std(values) for values in zip(*(one[layer] for one in per_class), strict=True)]
            for layer in self.layers
        }


def measure_adapter(folder: Path) -> AdapterMeasures:
    """Rank of F and the coefficients of one adapter.

    Args:
        folder: of the adapter, as PEFT saves it.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: an adapter of another method, or one with values that are not finite.

    Source: arXiv 2510.02631, Figures 4 and 5 [text].
    """
    method = read_mapping(folder / "adapter_config.json").get("peft_type")
    if method != "FUNLORA":
        raise ValueError(f"{folder} holds a {method} adapter, expected FUNLORA: no other method has an F to measure.")
    measures = AdapterMeasures(FunLoraConfig.from_pretrained(str(folder)), {}, {}, {})
    saved = read_tensors(folder / "adapter_model.safetensors", remedy="take it from where it came from")
    for layer, tensors in layers_of_state_dict(saved).items():
        own = {name: tensors[name] for name in ("alpha", "omega") if name in tensors}
        try:
            F = functional_matrix(tensors["A"], tensors["B"], **own, function=measures.settings.function)
            measures.rank[layer] = numerical_rank(F)
        except ValueError as error:
            raise ValueError(f"{folder}, layer {layer}: {error}") from error
        for name, values in own.items():
            getattr(measures, name)[layer] = values.tolist()
    return measures


def measure_run(path: Path) -> RunMeasures:
    """Measures of all adapters of a run.

    Args:
        path: folder of a run, with `adapters/class_<id>/`.

    Raises:
        FileNotFoundError: no adapters.
        ValueError: adapters of another method, without factors, or of several configurations.
    """
    folders = adapter_folders(path / ADAPTERS_FOLDER)
    if not folders:
        raise FileNotFoundError(
            f"{path} has no {ADAPTERS_FOLDER}/class_<id> folders: name a run of the strategy funlora."
        )
    adapters = {folder.name: measure_adapter(folder) for folder in folders}
    results = read_mapping(path / "results.json") if (path / "results.json").is_file() else {}
    # A run on an existing base has no folder of it, but its results list the layers in order of execution.
    order = execution_order(path / "base") if (path / "base").is_dir() else results.get("layer_importance")
    importance = layer_importance(folders, order=list(order or ()))
    if not importance:
        raise ValueError(f"{path} has adapters without factors, class vectors alone: there is no F to measure.")
    first = folders[0].name
    for name, adapter in adapters.items():
        if set(adapter.rank) != set(importance) or _shape(adapter.settings) != _shape(adapters[first].settings):
            raise ValueError(
                f"{path / ADAPTERS_FOLDER / name} has other layers or settings than {first}: measure runs whose adapters "
                "are alike."
            )
    losses = (results.get("held_out_loss") or {}).get("per_class") or {}
    losses = {f"class_{class_id}": loss for class_id, loss in losses.items() if loss is not None}
    return RunMeasures(
        path, list(importance), adapters, importance, {name: losses[name] for name in adapters if name in losses}
    )


def analyze_runs(paths: Sequence[Path], output_dir: Path) -> str:
    """Measure runs, write `ranks.json`, `coefficients.json` and the figures, and return a table.

    Args:
        paths: folders of runs, each given once. Runs are named after their function, and their folder where several
            share one.
        output_dir: made if it is missing; files of the same name there are replaced.

    Returns:
        Markdown: per run the rank over layers and classes, and the held-out loss beside it.

    Raises:
        ImportError: matplotlib is not installed; the JSON files are written first.
        FileNotFoundError: a folder without adapters.
        ValueError: no folder, one given twice, or adapters that cannot be measured, see `measure_run`.
    """
    if not paths:
        raise ValueError("`paths` is empty, expected the folder of at least one run.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"`paths` is {', '.join(map(str, paths))}, expected every run once.")
    runs = _named([measure_run(path) for path in paths])
    write_json(output_dir / "ranks.json", {name: _ranks(run) for name, run in runs.items()})
    write_json(output_dir / "coefficients.json", {name: _coefficients(run) for name, run in runs.items()})
    rank_by_layer({name: run.rank_by_layer() for name, run in runs.items()}, output_dir / "rank_by_layer.png")
    for name, run in runs.items():
        label = re.sub(r"[^\w.-]+", "_", name).strip("_")
        classes = f"{name}, {len(run.adapters)} class{'es' if len(run.adapters) > 1 else ''}"
        layer_importance_figure(run.importance, output_dir / f"importance_{label}.png", title=classes)
        panels = _panels(run)
        if panels:
            coefficients_by_layer(
                panels, output_dir / f"coefficients_{label}.png", title=f"{classes}: means over the classes"
            )
    return rank_table(runs)


def rank_table(runs: Mapping[str, RunMeasures]) -> str:
    """Rank over layers and classes beside the held-out loss, as Markdown; one row per run."""
    header = ("run", "layers", "classes", "rank: mean", "std", "least", "most", "held-out loss of these classes")
    rows = []
    for name, run in runs.items():
        ranks = [rank for adapter in run.adapters.values() for rank in adapter.rank.values()]
        loss = f"{mean(run.held_out_loss.values()):.4f}" if run.held_out_loss else "-"
        spread = [f"{value:.2f}" for value in _mean_and_std(ranks)]
        rows.append((name, len(run.layers), len(run.adapters), *spread, min(ranks), max(ranks), loss))
    return markdown_table(header, rows)


def _named(runs: Sequence[RunMeasures]) -> dict[str, RunMeasures]:
    """The runs by the shortest name that no other run has: function; function and folder; function and path."""
    names = [
        (run.settings.function, f"{run.settings.function}, {run.path.name}", f"{run.settings.function}, {run.path}")
        for run in runs
    ]
    uses = Counter(name for of_run in names for name in set(of_run))
    return {
        next((n for n in of_run if uses[n] == 1), of_run[-1]): run for of_run, run in zip(names, runs, strict=True)
    }


def _ranks(run: RunMeasures) -> dict[str, Any]:
    return {
        "run": str(run.path),
        **_shape(run.settings),
        "tolerance": "max(C_out, C_in) * float32 epsilon * largest singular value",
        "layers": {
            layer: {
                "mean": average,
                "std": spread,
                "per_class": {name: adapter.rank[layer] for name, adapter in run.adapters.items()},
            }
            for layer, (average, spread) in run.rank_by_layer().items()
        },
        "classes": {
            name: {"mean": mean(adapter.rank.values()), "held_out_loss": run.held_out_loss.get(name)}
            for name, adapter in run.adapters.items()
        },
    }


def _coefficients(run: RunMeasures) -> dict[str, Any]:
    return {
        "run": str(run.path),
        **_shape(run.settings),
        **{
            name: {
                layer: {
                    "mean": [average for average, _ in over_classes],
                    "std": [spread for _, spread in over_classes],
                    "per_class": {key: getattr(adapter, name)[layer] for key, adapter in run.adapters.items()},
                }
                for layer, over_classes in run.coefficients_by_layer(name).items()
            }
            for name in ("alpha", "omega")
        },
    }


def _panels(run: RunMeasures) -> dict[str, dict[str, list[float]]]:
    """What the figure of the coefficients shows: alpha, and how far alpha and omega have moved."""
    settings = run.settings
    zeros = torch.zeros(settings.num_functions)
    alpha = initial_alpha(settings.function, settings.num_functions, settings.operation)
    starts = [("alpha", "alpha", zeros), ("change of omega", "omega", default_omega(settings.num_functions))]
    if alpha is not None and alpha.any():
        starts.insert(1, ("change of alpha", "alpha", alpha))
    panels = {
        title: {
            layer: [average - begun for (average, _), begun in zip(over_classes, start.tolist(), strict=True)]
            for layer, over_classes in run.coefficients_by_layer(name).items()
        }
        for title, name, start in starts
    }
    return {title: by_layer for title, by_layer in panels.items() if by_layer}


def _shape(settings: FunLoraConfig) -> dict[str, Any]:
    """What adapters must share to be measured together."""
    fields = ("function", "operation", "r", "ratio", "num_functions", "train_omega")
    return {field: getattr(settings, field) for field in fields}


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    return mean(values), pstdev(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="Folder of a run of the strategy funlora.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Where the files go.")
    arguments = parser.parse_args()
    try:
        print(analyze_runs(arguments.runs, arguments.output_dir))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
