"""Measures the adapters of finished runs: rank of F, alpha and omega, importance of the layers.

    python examples/analyze_adapters.py outputs/digits outputs/digits_power --output_dir outputs/analysis

Writes ranks.json, coefficients.json and figures, and prints a table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from funlora_hf.evaluation.adapter_analysis import analyze_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="Folder of a run of the strategy funlora.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Where the files go.")
    arguments = parser.parse_args()
    try:
        print(analyze_runs(arguments.runs, arguments.output_dir))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
