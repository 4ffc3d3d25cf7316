"""Tables over several seeds: cells with mean and spread, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any


def provenance(runs: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    """How a table was made: the command, the machine, and the versions of the first of the runs that has results."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": next((run["versions"] for run in runs if run is not None), {}),
    }


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 1) -> str:
    """A table in Markdown, without a newline at its end.

    Args:
        header: titles of the columns.
        rows: cells, written as `str` does; a "|" in them is escaped.
        texts: so many first columns are aligned to the left, the others, of numbers, to the right.
    """
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    first, *others = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([first, f"|{'---|' * texts}{'---:|' * (len(header) - texts)}", *others])


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1); both None if there is no value or one is None, the second also for one value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    return mean(known), stdev(known) if len(known) > 1 else None


def spread_text(average: float | None, deviation: float | None, digits: int) -> str:
    """A cell of a table: "mean ± standard deviation", "-" without a mean.

    Args:
        average: or None.
        deviation: or None, where there is only one value. One that rounds to 0 (the evaluations of a fixed-step solver)
            is left out.
        digits: after the point.
    """
    if average is None:
        return "-"
    shown = f"{average:,.{digits}f}"
    return shown if not deviation or deviation < 0.5 * 10**-digits else f"{shown} ± {deviation:,.{digits}f}"
