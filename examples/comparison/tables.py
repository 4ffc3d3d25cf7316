"""Results of a comparison as rows of a table. Reads results; runs nothing, draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas
from seed_tables import markdown_table, mean_and_std, spread_text

from comparison.learning_rates import rate_argument
from comparison.runner import Compared
from funlora_hf.evaluation.figures import shorten


Results = Mapping[str, Any]

# Of a strategy on a terminal.
_LONGEST_NAME = 36


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        key: in JSON.
        group: the columns that stand together.
        title: with the unit.
        digits: after the point; None: as many as it takes.
        value: of one run's results; None where it was not measured.
    """

    key: str
    group: str
    title: str
    digits: int | None
    value: Callable[[Results], float | None]


@dataclass(frozen=True)
class Row:
    """One strategy.

    Args:
        compared: whose row it is.
        values: key of a column -> value of each seed, None where it was not measured or the run failed.
        means: key of a column -> mean over the runs that finished; None if one of them lacks it.
        deviations: key of a column -> standard deviation (n - 1) over them; None for fewer than two.
    """

    compared: Compared
    values: Mapping[str, Sequence[float | None]]
    means: Mapping[str, float | None]
    deviations: Mapping[str, float | None]

    @property
    def seeds_text(self) -> str:
        """How many seeds finished, out of how many if not all did."""
        finished, asked = len(self.compared.finished), len(self.compared.seeds)
        return str(asked) if finished == asked else f"{finished} of {asked}"

    def cell(self, column: Column) -> str:
        """ "mean ± standard deviation", or "-"."""
        average = self.means[column.key]
        if column.digits is None:
            return "-" if average is None else f"{average:g}"
        return spread_text(average, self.deviations[column.key], column.digits)


def columns_of(compared: Sequence[Compared]) -> list[Column]:
    """The columns; those of the image quality name what the images were compared by."""
    judge = _extractors(compared)
    distance = f"FID ({judge})" if judge == "inception" else f"Frechet distance ({judge})"
    return [
        Column("LA", "accuracy", "LA (%)", 2, lambda run: run.get("LA")),
        Column("AIA", "accuracy", "AIA (%)", 2, lambda run: run.get("AIA")),
        Column("forgetting", "accuracy", "forgetting (%)", 2, lambda run: run.get("forgetting")),
        Column(
            "own_classifier_LA", "accuracy", "own classifier's LA (%)", 2, lambda run: _in(run, "own_classifier", "LA")
        ),
        Column("parameters_per_class", "parameters", "PPC", 0, lambda run: run.get("parameters_per_class")),
        Column(
            "parameters_per_class_with_vector",
            "parameters",
            "PPC with vector",
            0,
            lambda run: run.get("parameters_per_class_with_vector"),
        ),
        Column("held_out_loss", "images", "held-out loss", 4, lambda run: _in(run, "held_out_loss", "mean")),
        Column("frechet_distance", "images", distance, 3, lambda run: _in(run, "image_quality", "frechet_distance")),
        Column("precision", "images", f"precision ({judge})", 3, lambda run: _in(run, "image_quality", "precision")),
        Column("recall", "images", f"recall ({judge})", 3, lambda run: _in(run, "image_quality", "recall")),
        Column("learning_rate", "work", "learning rate", None, _learning_rate),
        Column("training_seconds", "work", "training (s)", 1, training_seconds),
        Column("training_images", "work", "training images", 0, _training_images),
        Column("sampling_seconds", "work", "sampling (s)", 1, lambda run: _in(run, "seconds", "sampling")),
        Column("nfe", "work", "NFE", 1, lambda run: run.get("nfe")),
        Column("kept_megabytes", "kept", "kept (MB)", 3, _kept_megabytes),
        Column("kept_growth_megabytes", "kept", "growth, task 2 to last (MB)", 3, _growth_megabytes),
    ]


def rows_of(compared: Sequence[Compared], columns: Sequence[Column]) -> list[Row]:
    """One row a strategy, in their order."""
    rows = []
    for one in compared:
        values = {
            column.key: [None if run.results is None else column.value(run.results) for run in one.outcomes]
            for column in columns
        }
        # A mean over some of the finished runs would hide that the others were not measured.
        averages = {column.key: mean_and_std([column.value(run) for run in one.finished]) for column in columns}
        means = {key: average for key, (average, _) in averages.items()}
        deviations = {key: deviation for key, (_, deviation) in averages.items()}
        rows.append(Row(one, values, means, deviations))
    return rows


def flat_rows(rows: Sequence[Row], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The rows for CSV: strategy, seeds, then mean and "std" of each column; None where there is nothing."""
    flat = []
    for row in rows:
        cells: dict[str, Any] = {"strategy": row.compared.choice.label, "seeds": len(row.compared.finished)}
        for column in columns:
            cells[column.title] = row.means[column.key]
            cells[f"{column.title} std"] = row.deviations[column.key]
        flat.append(cells)
    return flat


def as_markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The rows as one Markdown table, each cell "mean ± standard deviation over the seeds"."""
    header = ("strategy", "seeds", *(column.title for column in columns))
    cells = [(row.compared.choice.label, row.seeds_text, *(row.cell(column) for column in columns)) for row in rows]
    return markdown_table(header, cells) + "\n"


def as_text(rows: Sequence[Row], columns: Sequence[Column], *, width: int = 120) -> str:
    """The rows for a terminal: in parts of as many columns as fit, each with the strategies' names in front.

    Args:
        rows: of the table.
        columns: of the table; those in which every cell is empty are left out.
        width: of the terminal, in characters.
    """
    names = [shorten(row.compared.choice.label, _LONGEST_NAME) for row in rows]
    cells = {"seeds": [row.seeds_text for row in rows]}
    cells |= {column.title: [row.cell(column) for row in rows] for column in columns}
    shown = {title: of_rows for title, of_rows in cells.items() if set(of_rows) != {"-"}}
    return pandas.DataFrame(shown, index=names).to_string(line_width=width) + "\n"


def training_seconds(run: Results) -> float | None:
    """Seconds of training over all tasks, with what prepares it, such as sampling what is replayed."""
    per_task = _in(run, "seconds", "training_per_task")
    return sum(per_task) if per_task else _in(run, "seconds", "training")


def _learning_rate(run: Results) -> float | None:
    """After the base."""
    settings = _in(run, "settings", "ContinualTrainingArguments")
    return settings[rate_argument(run["strategy"])] if settings else None


def _training_images(run: Results) -> int | None:
    per_task = run.get("training_images_per_task")
    return sum(per_task) if per_task else None


def _kept_megabytes(run: Results) -> float | None:
    kept = _in(run, "memory", "persistent")
    return None if kept is None else kept / 1e6


def _growth_megabytes(run: Results) -> float | None:
    """From task 2, when all that does not grow is there."""
    per_task = run.get("memory_per_task")
    if not per_task or len(per_task) < 3:
        return None
    return (per_task[-1]["persistent"] - per_task[1]["persistent"]) / 1e6


def _extractors(compared: Sequence[Compared]) -> str:
    names = {_in(run, "image_quality", "extractor") for one in compared for run in one.finished} - {None}
    return " or ".join(sorted(names)) or "not measured"


def _in(run: Results, part: str, key: str) -> Any:
    """A value of a part of the results that a run may lack."""
    return (run.get(part) or {}).get(key)
