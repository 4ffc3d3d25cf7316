SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 0
STRATEGY ?= funlora
ARGS ?=
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
CHECKED := src examples tests

.PHONY: demo test style quality clean

# The main job on scikit-learn's digits: make demo; make demo SEEDS='0 1 2'; make demo STRATEGY=joint
demo: .venv/installed
	@set -e; all=""; \
	for seed in $(SEEDS); do \
	  folder=outputs/digits; \
	  if [ "$(STRATEGY)" != funlora ]; then folder=$${folder}_$(STRATEGY); fi; \
	  if [ "$(words $(SEEDS))" != 1 ] || [ $$seed != 0 ]; then folder=$${folder}_seed$$seed; fi; \
	  $(LAUNCH) examples/continual_train.py --strategy $(STRATEGY) --seed $$seed --output_dir $$folder \
	    --overwrite_output_dir --joint_results outputs/digits_joint/results.json $(ARGS); \
	  all="$$all $$folder/results.json"; \
	done; \
	if [ "$(words $(SEEDS))" != 1 ]; then $(BIN)/python examples/summarize_runs.py $$all; fi

test: quality
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

quality: .venv/installed
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

style: .venv/installed
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv outputs .pytest_cache .ruff_cache .hypothesis
