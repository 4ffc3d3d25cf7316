"""Results of an ablation as the rows of a table and as Markdown. Reads results; runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from seed_tables import markdown_table, mean_and_std, spread_text

from ablation.variants import TABLES, Variant
from funlora_hf.tuner.learning_rates import alpha_rate


Results = Mapping[str, Sequence[Mapping[str, Any] | None]]

# Column -> (digits, value of one run).
_COLUMNS: dict[str, tuple[int, Callable[[Mapping[str, Any]], float | None]]] = {
    "LA (%)": (2, lambda run: run["LA"]),
    "AIA (%)": (2, lambda run: run["AIA"]),
    "held-out loss": (4, lambda run: mean(losses_after_base(run).values())),
    "PPC": (0, lambda run: run["parameters_per_class"]),
    "PPC with vector": (0, lambda run: run["parameters_per_class_with_vector"]),
    "NFE": (1, lambda run: run["nfe"]),
    "seconds": (0, lambda run: run["seconds"]["total"]),
    "learning rate": (4, lambda run: run["settings"]["ContinualTrainingArguments"]["adapter_learning_rate"]),
    "alpha's multiple": (0, lambda run: _alpha_rate(run["settings"])),
}
# Settings rather than measurements: the same in every run of a variant, but for the numbers of layers that are chosen by
# importance, of which the mean is shown.
_RATES = ("learning rate", "alpha's multiple")
_WITHOUT_SPREAD = ("PPC", "PPC with vector", *_RATES)


def ablation_rows(results: Results, tables: Sequence[str]) -> list[dict[str, Any]]:
    """One row for every variant of every table: table, variant, number of seeds, then mean and std of each column.

    Args:
        results: key of a variant -> results of its runs, None for one that failed; variants without are left out.
        tables: which to make.

    Returns:
        Rows with equal keys; None where there is nothing to average.
    """
    rows = []
    for table in tables:
        for variant in TABLES[table]:
            if variant.key in results:
                rows.append({"table": table, "variant": variant.label, **_averages(results, variant)})
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as one Markdown table, each cell "mean ± standard deviation over the seeds"."""
    names = ("table", "variant", "seeds")
    cells = [[*(row[name] for name in names), *(_cell(row, column) for column in _COLUMNS)] for row in rows]
    return markdown_table([*names, *_COLUMNS], cells, texts=2) + "\n"


def _averages(results: Results, variant: Variant) -> dict[str, Any]:
    runs = [run for run in results[variant.key] if run is not None]
    row: dict[str, Any] = {"seeds": len(runs)}
    for column, (_, value) in _COLUMNS.items():
        row[column], deviation = mean_and_std([value(run) for run in runs])
        if column not in _WITHOUT_SPREAD:
            row[f"{column} std"] = deviation
    return row


def _cell(row: Mapping[str, Any], column: str) -> str:
    digits, _ = _COLUMNS[column]
    if row[column] is None:
        return "-"
    if column in _RATES:
        return f"{row[column]:g}"
    return spread_text(row[column], row.get(f"{column} std"), digits)


def losses_after_base(run: Mapping[str, Any]) -> dict[str, float]:
    """The held-out loss of each class that came after the base, by id: those of task 1 are the same in every run on one base."""
    losses = run["held_out_loss"]["per_class"]
    return {str(class_id): losses[str(class_id)] for task in run["tasks"][1:] for class_id in task}


def _alpha_rate(settings: Mapping[str, Any]) -> float | None:
    model, training = settings["ModelArguments"], settings["ContinualTrainingArguments"]
    return alpha_rate(model["peft_method"], model["function"], training["adapter_alpha_rate"])
