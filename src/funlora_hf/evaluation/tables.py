"""Show the results of a run as text for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.class_folder import ADAPTERS_FOLDER, LORAS_FOLDER
from ..continual.costs import Part


# Follows the name of what has learned from other data than that of the run.
OUTSIDE_DATA = " (outside data)"


def summary_table(results: Mapping[str, Any]) -> str:
    """Return the results of one run as plain text."""
    lines = [f"{what_ran(results)} on {results['dataset']}, seed {results['seed']}", ""]
    if results.get("nfe", 0) is None:
        lines.append("evaluation        none yet: `funlora evaluate` and the folder of the run")
    elif results["A"] is None:
        lines.append("accuracy          not measured: no real images of the base's classes")
    else:
        lines.append("task              " + "".join(f"{t + 1:>8}" for t in range(len(results["A"]))))
        lines.append("A_t (%)           " + "".join(map(_accuracy, results["A"])))
        lines.append("")
        for key, name, meaning in (
            ("LA", "LA (%)", "   last accuracy: the mean over all tasks, after the last one"),
            ("AIA", "AIA (%)", "   average incremental accuracy: the mean of A_t over t"),
            ("forgetting", "forgetting (%)", ""),
        ):
            lines.append(f"{name:<18}{_accuracy(results[key])}{meaning}")
        if results.get("LA_real") is not None:
            lines.insert(
                -2,
                f"{'LA, real (%)':<18}{_accuracy(results['LA_real'])}   what as many real images give instead of samples",
            )
    if results.get("own_classifier") is not None:
        lines.append(f"{'own classifier':<18}{results['own_classifier']['LA']:>8.2f} (LA in %)")
    losses = results["held_out_loss"]
    if losses["mean"] is not None:
        lines.append(f"{'held-out loss':<18}{losses['mean']:>8.4f}")
    elif results.get("outside_data"):
        lines.append(f"{'held-out loss':<18}{'-':>8}")
    for name, (digits, value) in image_quality(results).items():
        lines.append(f"{name:<18}{value:>8.{digits}f}")
    if (found := results.get("recognised")) is not None:
        least = min(found["per_class"], key=found["per_class"].get)
        share = found["per_class"][least]
        lines.append(
            f"{'recognised (%)':<18}{found['mean']:>8.2f}   least: {share:.2f}, {results['class_names'][least]}"
        )
    if results["parameters_per_class"] is not None:
        with_vector = results["parameters_per_class_with_vector"]
        lines.append(
            f"{'PPC':<18}{results['parameters_per_class']:>8} ({with_vector} with the class vector)   parameters per class"
        )
    zero = results["zero_forgetting"]
    if zero is not None:
        base = "unchanged" if zero["base_sha256_before"] == zero["base_sha256_after"] else "CHANGED"
        lines.append(f"{'zero forgetting':<18}{_samples_text(zero)}, base {base}")
    lines.append(f"{'seconds':<18}{results['seconds']['total']:>8.0f}")
    return "\n".join(lines)


def what_next(results: Mapping[str, Any], folder: Path) -> str:
    """Return where the parts of a finished run are and what to type next, as plain text."""
    run = shlex.quote(str(folder))
    adapters = results.get("peft_method") is not None  # earlier versions did not write it
    outside = results.get("outside_data", False)
    commands = [] if outside else [f"funlora sample {run} --classes {results['class_order'][-1]}"]
    if results["nfe"] is None:
        commands.append(f"funlora evaluate {run}")
    if adapters:
        first = "" if (folder / ADAPTERS_FOLDER).is_dir() else "  # makes the first adapter"
        commands.append(f"funlora add IMAGES --to {run}{first}")
    commands += (
        [f'pipe.load_lora_weights("{folder / LORAS_FOLDER}/task_1")'] if outside else [f"funlora push {run} USER/REPO"]
    )
    parts = {
        "base": "base/",
        ADAPTERS_FOLDER: f"{ADAPTERS_FOLDER}/class_<id>/",
        "model": "model/",
        LORAS_FOLDER: f"{LORAS_FOLDER}/task_<n>/",
        "results.json": "results.json",
    }
    there = ", ".join(text for name, text in parts.items() if (folder / name).exists())
    return "\n".join([f"{folder} holds {there} and figures/. Next:", *(f"  {line}" for line in commands)])


def how_to_see(base: str, folder: Path, class_ids: Iterable[int]) -> str:
    """Return what to type to see classes whose adapters are in a folder, next to the base or elsewhere."""
    places = [str(folder)] if Path(base) == folder else [base, "--adapters", str(folder)]
    return f"To see them: funlora sample {shlex.join(places)} --class_label {' '.join(map(str, class_ids))}"


def _accuracy(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>8}"


def costs_table(parts: Sequence[Part]) -> str:
    """Return the costs of a run as plain text: a line for each part, and their sum."""
    lines = [f"{'':<26}{'':>24} {'per second':>11} {'time':>10} {'TFLOP':>11} {'memory':>9}"]
    for part in parts:
        unit = part.unit if part.images == 1 else f"{part.unit} of {part.images}"
        numbers = f"{_rounded(1 / part.seconds):>11} {_duration(part.count * part.seconds):>10} {_rounded(part.flops / 1e12):>11}"
        memory = "" if part.memory is None else f"{part.memory / 1e9:.2f} GB"
        lines.append(f"{part.name:<26}{f'{part.count:,} {unit}':>24} {numbers} {memory:>9}")
    together = _duration(sum(part.count * part.seconds for part in parts))
    lines.append(f"{'together':<26}{'':>24} {'':>11} {together:>10}")
    return "\n".join(line.rstrip() for line in lines)


def _duration(seconds: float) -> str:
    size, unit = next((one for one in ((3600, "h"), (60, "min")) if seconds >= one[0]), (1, "s"))
    return f"{_rounded(seconds / size)} {unit}"


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def what_ran(results: Mapping[str, Any]) -> str:
    """Return the name of the run's strategy, with the method of its adapters if that is not FunLoRA, and with a mark of outside data."""
    method = results.get("peft_method")
    named = results["strategy"] == "funlora" and method not in (None, "funlora")
    name = f"{results['strategy']} ({method})" if named else results["strategy"]
    return f"{name}{OUTSIDE_DATA}" if results.get("outside_data") else name


def image_quality(results: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Return name -> (digits, value) of each measure of a run's images; results of earlier versions have none."""
    quality = results.get("image_quality")
    if quality is None:
        return {}
    return {
        # The distance is FID only in Inception's features.
        "FID" if quality["extractor"] == "inception" else "Frechet distance": (2, quality["frechet_distance"]),
        "precision": (3, quality["precision"]),
        "recall": (3, quality["recall"]),
    }


def _samples_text(zero: Mapping[str, Any]) -> str:
    if zero["identical"] is None:
        return "first samples not compared (other machine or thread count)"
    verdict = "equal to the bit" if zero["identical"] else f"CHANGED: classes {zero['classes_changed']}"
    return f"first samples of {zero['classes_compared']} classes {verdict}"
