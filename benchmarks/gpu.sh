#!/usr/bin/env bash
# Everything worth knowing of one GPU, in less than 9 minutes and with nothing to download; results in benchmarks/results/gpu.json.
#
#     bash benchmarks/gpu.sh
#     bash benchmarks/gpu.sh --data path/to/cifar10/train.parquet
#
# PYTHON says which interpreter, if not the one of .venv or python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" benchmarks/gpu.py "$@"
