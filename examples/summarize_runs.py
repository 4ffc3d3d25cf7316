"""Prints the mean of several runs that differ in their seed.

python examples/summarize_runs.py outputs/digits_seed*/results.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from funlora_hf.evaluation.tables import mean_table
from funlora_hf.utils.files import read_json


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(mean_table([read_json(Path(path)) for path in sys.argv[1:]]))


if __name__ == "__main__":
    main()
