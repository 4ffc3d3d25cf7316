"""Measures two or more ways to do the same, in turns within one process, and writes their ratios down.

Whatever else the machine does then meets all of them alike: ratios hold where seconds do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import diffusers
import peft
import torch
from tqdm.auto import tqdm

import funlora_hf
from funlora_hf.utils.files import whole_file, write_json


RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Comparison:
    """One row of a benchmark.

    Args:
        name: what is compared.
        ratio: median over the rounds of seconds of the first side / seconds of the second.
        low: lower quartile of that ratio.
        high: upper quartile.
        seconds: side -> median seconds of one call.
        goal: what the ratio should come to, in words, or "".
    """

    name: str
    ratio: float
    low: float
    high: float
    seconds: dict[str, float]
    goal: str = ""


@dataclass(frozen=True)
class Skipped:
    """A row that could not be measured here.

    Args:
        name: what was to be compared.
        reason: why it was not.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Point:
    """A quantity at one number of classes.

    Args:
        classes: how many.
        value: the median, or the quantity itself where it does not vary.
        low: lower quartile.
        high: upper quartile.
    """

    classes: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """How a quantity grows with the number of classes.

    Args:
        name: what is measured.
        unit: of the values.
        points: by rising number of classes.
    """

    name: str
    unit: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Findings:
    """What a benchmark has found.

    Args:
        rows: ratios.
        skipped: rows that could not be measured.
        curves: growth with the number of classes.
        facts: whatever else is worth recording, JSON-able, by name.
        series: numbers to draw, too many for a table, by name.
    """

    rows: Sequence[Comparison] = ()
    skipped: Sequence[Skipped] = ()
    curves: Sequence[Curve] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)


def compare(
    name: str, sides: Mapping[str, Callable[[], object]], *, rounds: int = 11, calls: int = 1, goal: str = ""
) -> Comparison:
    """
    Call two sides in turns.

    Args:
        name: of the row.
        sides: two functions by name; the ratio is the first's seconds over the second's.
        rounds: turns of each, at least 2; the order alternates. One more, before them, does not count.
        calls: in a turn.
        goal: for the row.
    """
    return comparison(name, take_turns(name, sides, rounds=rounds, calls=calls), goal=goal)


def take_turns(
    name: str, sides: Mapping[Hashable, Callable[[], object]], *, rounds: int, calls: int = 1
) -> dict[Hashable, list[float]]:
    """
    Call any number of sides in turns; arguments as for `compare`.

    Returns:
        side -> seconds of one call, in every round that counts.
    """
    seconds: dict[Hashable, list[float]] = {side: [] for side in sides}
    for number in tqdm(range(rounds + 1), desc=name, leave=False):
        for side in sides if number % 2 else reversed(sides):
            started = time.perf_counter()
            for _ in range(calls):
                sides[side]()
            _wait_for_device()
            if number:
                seconds[side].append((time.perf_counter() - started) / calls)
    return seconds


def comparison(name: str, seconds: Mapping[str, Sequence[float]], *, goal: str = "") -> Comparison:
    """
    A row from seconds that were measured in rounds.

    Args:
        name: of the row.
        seconds: of the two sides, by name, at least two rounds of each; the ratio is the first's over the second's.
        goal: for the row.
    """
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return Comparison(name, middle, low, high, {side: median(values) for side, values in seconds.items()}, goal)


def point(classes: int, values: Sequence[float]) -> Point:
    """A point of a curve from values that were measured in at least two rounds."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Point(classes, middle, low, high)


def main(description: str | None, measure: Callable[[], list[Comparison] | Findings], file: str) -> Path:
    """
    What a benchmark's script does: set threads and seed, measure, print a table, write `results/<name>.json`.

    Args:
        description: the script's docstring.
        measure: makes the rows, or all findings.
        file: `__file__` of the script, which names the results.

    Returns:
        Path of the JSON file.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--num_threads", type=int, default=2, help="Threads of torch (default: 2).")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Where the JSON goes.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    torch.manual_seed(0)
    measured = measure()
    findings = measured if isinstance(measured, Findings) else Findings(rows=measured)
    for row in findings.skipped:
        print(f"Skipped: {row.name}: {row.reason}", file=sys.stderr)
    name = Path(file).stem
    # What a benchmark has nothing of is left out.
    found = {part: value for part, value in asdict(findings).items() if value or part == "rows"}
    record = {"benchmark": name, "about": (description or "").splitlines()[0], **environment(), **found}
    path = arguments.output_dir / f"{name}.json"
    write_json(path, record)
    print("\n".join(_body(record)))
    return path


def bytes_saved(compute: Callable[[], object]) -> int:
    """Bytes that autograd keeps of a computation for its backward, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()  # kept until all is counted: a storage that is given back may be another's soon
    del result
    return sum(storages.values())


def environment() -> dict[str, Any]:
    """What the seconds depend on."""
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, peft, funlora_hf)}
    return {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def table(rows: Sequence[Comparison]) -> str:
    """The rows as Markdown."""
    lines = ["| what | seconds | ratio | goal |", "|---|---|---|---|"]
    for row in rows:
        seconds = ", ".join(f"{side}: {_rounded(value)}" for side, value in row.seconds.items())
        lines.append(f"| {row.name} | {seconds} | {row.ratio:.3g} ({row.low:.3g} to {row.high:.3g}) | {row.goal} |")
    return "\n".join(lines)


def growth(curves: Sequence[Curve]) -> str:
    """The curves as one Markdown table, a column for each number of classes."""
    counts = sorted({point.classes for curve in curves for point in curve.points})
    lines = [f"| what | {' | '.join(f'{count:,}' for count in counts)} |", "|---" * (1 + len(counts)) + "|"]
    for curve in curves:
        values = {
            point.classes: f"{point.value:,.3g}" if point.value < 999.5 else f"{point.value:,.0f}"
            for point in curve.points
        }
        cells = " | ".join(values.get(count, "") for count in counts)
        lines.append(f"| {curve.name} ({curve.unit}) | {cells} |")
    return "\n".join(lines)


def summary(folder: Path = RESULTS) -> str:
    """All results of a folder as one page, written to its README.md.

    Args:
        folder: with the JSON files.
    """
    parts = [
        "# Benchmarks",
        "",
        "`make bench` writes this page. Both sides of a ratio run alternately in one process; the ratio is the median over the "
        "turns, with its quartiles.",
    ]
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        where = f"{record['machine']}, {record['threads']} threads, Python {record['python']}, {versions}"
        parts += ["", f"## {record['benchmark']}", "", record["about"], *_body(record), "", f"({where})"]
    page = "\n".join(parts) + "\n"
    with whole_file(folder / "README.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return page


def _body(record: Mapping[str, Any]) -> list[str]:
    """Lines of what a record holds besides its surroundings, an empty one before each part."""
    lines = []
    if record["rows"]:
        lines += ["", table([Comparison(**row) for row in record["rows"]])]
    if curves := record.get("curves"):
        points = [[Point(**point) for point in curve["points"]] for curve in curves]
        lines += ["", growth([Curve(**{**curve, "points": p}) for curve, p in zip(curves, points, strict=True)])]
    for row in record.get("skipped", []):
        lines += ["", f"Skipped: {row['name']}: {row['reason']}"]
    for name, value in record.get("facts", {}).items():
        lines += ["", f"{name}: {value}"]
    return lines


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _rounded(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


if __name__ == "__main__":
    print(summary())
