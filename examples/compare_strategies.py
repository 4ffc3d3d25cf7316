"""Compares strategies of continual learning on the same tasks and seeds: a table, figures, and a page that shows them.

    python examples/compare_strategies.py --strategies funlora frozen joint --seeds 0 1 2 --output_dir outputs/comparison
    python examples/compare_strategies.py --config digits_2-2 --num_workers 2 \
        --strategies funlora funlora:function=power,label=power "funlora:adapter_learning_rate=1e-2"
    python examples/compare_strategies.py --learning_rates 2e-3 6e-3 2e-2

A strategy is a name, or name:key=value,key=value; a key is an option of the strategy, an argument of its run, or `label`,
which is what tables and figures call it. Strategies that start from a base share one for each seed, unless the classes have an
order of their own (`--class_order`, `--class_order_seed`). With `--learning_rates`, each gets its own rate, chosen on training images and
written to `learning_rates.json`.

Each run has a folder of its own, `seed_<seed>/<strategy>` in `--output_dir`, beside `comparison.md`, `comparison.csv`,
`comparison.json`, `figures/` and `report.html`, which holds all of it in one file; bases lie in `bases/`.

Started again with the same arguments, it runs what is not finished. All arguments of `continual_train.py` hold for every
run; `--help` lists them.

Exit codes: 0, all runs finished; 1, an error, or a run failed: the others are run, and the report names it; 2, an argument
that is not known.
"""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

from comparison.report import write_comparison
from comparison.runner import ComparisonArguments, failures, run_comparison
from funlora_hf.train import ERRORS, parse


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "fsspec", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        reference, comparison = parse(sys.argv[1:], ComparisonArguments, description=__doc__)
        compared = run_comparison(comparison, reference)
    except (*ERRORS, RuntimeError) as error:
        logging.getLogger(__name__).debug("details", exc_info=True)
        sys.exit(f"error: {error}")
    output_dir = Path(reference.training.output_dir)
    print(write_comparison(compared, output_dir, command=shlex.join(["python", *sys.argv])))
    print(f"See {output_dir / 'report.html'}.")
    failed = failures(compared)
    if failed:
        runs = ", ".join(f"{label} (seed {seed})" for label, seed, _ in failed)
        sys.exit(f"error: failed runs: {runs}: see their log.txt in {output_dir}")


if __name__ == "__main__":
    main()
