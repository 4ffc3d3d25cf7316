"""Measures two or more ways to do the same, in turns within one process, and writes their ratios down.

Whatever else the machine does then meets all of them alike: ratios hold where seconds do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import diffusers
import peft
import torch
from tqdm.auto import tqdm

import funlora_hf
from funlora_hf.files import whole_file, write_json


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
    first, second = sides
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in tqdm(range(rounds + 1), desc=name, leave=False):
        for side in (first, second) if number % 2 else (second, first):
            started = time.perf_counter()
            for _ in range(calls):
                sides[side]()
            _wait_for_device()
            if number:
                seconds[side].append((time.perf_counter() - started) / calls)
    ratios = [one / other for one, other in zip(seconds[first], seconds[second], strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return Comparison(name, middle, low, high, {side: median(values) for side, values in seconds.items()}, goal)


def main(description: str | None, measure: Callable[[], list[Comparison]], file: str) -> None:
    """
    What a benchmark's script does: set threads and seed, measure, print a table, write `results/<name>.json`.

    Args:
        description: the script's docstring.
        measure: makes the rows.
        file: `__file__` of the script, which names the results.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_threads", type=int, default=2, help="Threads of torch (default: 2).")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Where the JSON goes.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    torch.manual_seed(0)
    rows = measure()
    name = Path(file).stem
    record = {"benchmark": name, "about": (description or "").splitlines()[0], **environment()}
    write_json(arguments.output_dir / f"{name}.json", {**record, "rows": [asdict(row) for row in rows]})
    print(table(rows))


def environment() -> dict[str, Any]:
    """What the seconds depend on."""
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, peft, funlora_hf)}
    return {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def table(rows: list[Comparison]) -> str:
    """The rows as Markdown."""
    lines = ["| what | seconds | ratio | goal |", "|---|---|---|---|"]
    for row in rows:
        seconds = ", ".join(f"{side}: {_rounded(value)}" for side, value in row.seconds.items())
        lines.append(f"| {row.name} | {seconds} | {row.ratio:.3g} ({row.low:.3g} to {row.high:.3g}) | {row.goal} |")
    return "\n".join(lines)


def summary(folder: Path = RESULTS) -> str:
    """All results of a folder as one page, written to its README.md.

    Args:
        folder: with the JSON files.
    """
    parts = [
        "# Benchmarks",
        "",
        "`make bench` measures them anew. Both sides of a ratio run in turns in one process; it is the median over the turns, "
        "with its quartiles.",
    ]
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [Comparison(**row) for row in record["rows"]]
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        where = f"{record['machine']}, {record['threads']} threads, Python {record['python']}, {versions}"
        parts += ["", f"## {record['benchmark']}", "", record["about"], "", table(rows), "", f"({where})"]
    page = "\n".join(parts) + "\n"
    with whole_file(folder / "README.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return page


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
