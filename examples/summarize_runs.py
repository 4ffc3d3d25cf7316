"""Prints the mean of several runs that differ in their seed.

python examples/summarize_runs.py outputs/digits_seed*/results.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from funlora_hf.evaluation.tables import image_quality, what_ran
from funlora_hf.utils.files import read_json


def mean_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation of several runs that differ in their seed, as plain text."""
    lines = [f"{what_ran(runs[0])} on {runs[0]['dataset']}, seeds {', '.join(str(run['seed']) for run in runs)}", ""]
    rows = {
        "LA (%)": (2, [run["LA"] for run in runs]),
        "AIA (%)": (2, [run["AIA"] for run in runs]),
        "forgetting (%)": (2, [run["forgetting"] for run in runs]),
        "held-out loss": (4, [run["held_out_loss"]["mean"] for run in runs]),
        **_image_quality_of_all(runs),
        "seconds": (0, [run["seconds"]["total"] for run in runs]),
    }
    for name, (digits, values) in rows.items():
        if name == "held-out loss" and runs[0].get("outside_data"):
            lines.append(f"{name:<18}{'-':>8}")
        elif None not in values:
            spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
            lines.append(f"{name:<18}{mean(values):>8.{digits}f}{spread}")
    return "\n".join(lines)


def _image_quality_of_all(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, list[float]]]:
    """The same of several runs; empty unless all were measured in the same way."""
    measured = [image_quality(run) for run in runs]
    ways = {
        tuple(run["image_quality"][key] for key in ("extractor", "neighbours", "num_real", "num_generated"))
        for run, quality in zip(runs, measured, strict=True)
        if quality
    }
    if not all(measured) or len(ways) > 1:
        return {}
    return {name: (digits, [quality[name][1] for quality in measured]) for name, (digits, _) in measured[0].items()}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(mean_table([read_json(Path(path)) for path in sys.argv[1:]]))


if __name__ == "__main__":
    main()
