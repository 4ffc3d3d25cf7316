"""Makes the paper's tables at the size of the data at hand: functions, operations, ratio, layers, rivals, solvers.

    python examples/ablation.py --output_dir outputs/ablation --num_workers 2
    python examples/ablation.py --config digits_2-2 --tables rivals solvers --seeds 0 1 \
        --learning_rates 5e-3 1e-2 2e-2 4e-2 --alpha_rates 1 3 10

Trains one base per seed and then every variant on it, and writes `ablation.md`, `ablation.csv`, `ablation.json` and, with
`--learning_rates`, `learning_rates.json` into `--output_dir`. Started again with the same arguments, it runs what is not finished. All arguments of
`continual_train.py` hold for every run; `--help` lists them.
"""

from __future__ import annotations

import json
import logging
import sys
from itertools import chain
from pathlib import Path

from seed_tables import as_csv, provenance

from ablation.runner import AblationArguments, run_ablation
from ablation.tables import ablation_rows, as_markdown
from ablation.variants import variants_of
from funlora_hf.train import ERRORS, parse
from funlora_hf.utils.files import whole_file


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        reference, ablation = parse(sys.argv[1:], AblationArguments, description=__doc__)
        variants = variants_of(ablation.tables, ablation.variants)
        results = run_ablation(ablation, reference, variants)
    except (*ERRORS, RuntimeError) as error:
        logging.getLogger(__name__).debug("details", exc_info=True)
        sys.exit(f"error: {error}")
    rows = ablation_rows(results, ablation.tables)
    record = {**provenance(chain(*results.values())), "rows": rows}
    output_dir = Path(reference.training.output_dir)
    contents = {
        "ablation.json": json.dumps(record, indent=2) + "\n",
        "ablation.csv": as_csv(rows),
        "ablation.md": as_markdown(rows),
    }
    for name, text in contents.items():
        with whole_file(output_dir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(contents["ablation.md"])
    failed = [key for key, runs in results.items() if None in runs]
    if failed:
        sys.exit(f"error: runs of {', '.join(failed)} failed: see their log.txt in {output_dir}")


if __name__ == "__main__":
    main()
