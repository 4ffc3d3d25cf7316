SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 0
STRATEGY ?= funlora
ARGS ?=
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
CHECKED := src examples benchmarks tests docs

.PHONY: demo space tiny-base test test-fast test-slow soak test-oldest-peft test-quantization test-space bench docs style quality clean

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

# A page to look at outputs/digits, or at what is named: make space ARGS='--base path/to/base --adapters path/to/adapters'
space: .space/installed
	PYTHONPATH="$(CURDIR)/.space" $(BIN)/python examples/space/app.py $(ARGS)

# The tiny text-to-image base and its judges from nothing, into outputs/tiny_base; goes on where it was stopped.
tiny-base: .venv/installed
	$(BIN)/python -m funlora_hf.personalization.tiny.making --folder outputs/tiny_base $(ARGS)

test: quality
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The inner loop: the maths, the tuner, files, and one small run; under 2 minutes on 2 cores.
test-fast: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/utils tests/baselines \
	  tests/tuner/test_functional.py tests/tuner/test_layer.py tests/tuner/test_config.py tests/tuner/test_merging.py \
	  tests/tuner_base/test_mixed_batches.py tests/tuner/test_earlier_adapters.py tests/adapters/test_class_folder.py tests/utils/test_files.py \
	  tests/test_flow_matching.py tests/sampling/test_solvers.py tests/sampling/test_pipeline.py tests/recipes/test_reading.py tests/continual/test_run_folder.py

# What `make test` leaves out for its time: PEFT's own tests for all combinations of function, operation and target, of which it
# runs some, long compilations, and more of runs that are killed or stop by themselves.
test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m slow $(ARGS)

# What docs/reliability.md promises, tried many times: kills, full disks, hostile files, 200 classes in one process; hours.
soak: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m soak

# The tests of what PEFT does for us, with the oldest peft that pyproject.toml allows.
test-oldest-peft: .oldest-peft
	PYTHONPATH="$(CURDIR)/.oldest-peft" OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile \
	  tests/tuner tests/tuner_base tests/sampling/test_pipeline.py tests/test_layer_selection.py tests/adapters/test_loaded_adapters.py \
	  tests/adapters/test_untrusted_adapter.py tests/hub/test_push.py

# The tests of quantized bases, with the libraries that have wheels here; those of others are skipped.
test-quantization: .quantization
	PYTHONPATH="$(CURDIR)/.quantization" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k quantized \
	  tests/tuner/test_quantized.py tests/docs/test_text_to_image_memory.py

# The page in a browser: needs Chromium and its driver.
test-space: .space/installed
	PYTHONPATH="$(CURDIR)/.space" OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/examples/test_space.py

# Ratios of every claim about speed, into benchmarks/results; about 20 minutes on a machine that does nothing else.
bench: .venv/installed
	@set -e; for script in functional_matrix training_step linear evaluation adapter_bank rivals processes scaling soak; do \
	  $(BIN)/python benchmarks/$$script.py; \
	done
	$(BIN)/python benchmarks/interleaved.py > /dev/null

# The documentation as a site, into site/; a warning, such as of a link without a target, is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

quality: .venv/installed
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/lint-imports
	$(BIN)/mypy

style: .venv/installed
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# Only peft itself: a folder that comes before .venv's packages.
.oldest-peft: .venv/installed
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ \
	  "peft==$$(sed -n 's/.*"peft>=\([0-9.]*\)".*/\1/p' pyproject.toml)"
	touch $@

# Without what they depend on, in a folder that comes before .venv's packages: nothing else changes.
.quantization: .venv/installed
	rm -rf $@
	for package in $$(sed -n 's/^quantization = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",'); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --target $@ \
	    --constraint constraints.txt "$$package" || echo "No wheel of $$package here."; \
	done
	mkdir -p $@
	touch $@

# Gradio wants another pillow than constraints.txt has: a folder that comes before .venv's packages.
.space/installed: .venv/installed
	rm -rf .space
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .space \
	  --constraint <(grep -v '^pillow==' constraints.txt) $$(sed -n 's/^space = \["\(.*\)"\]/\1/p' pyproject.toml) selenium
	touch $@

clean:
	rm -rf .venv .space .oldest-peft .quantization outputs site .pytest_cache .ruff_cache .mypy_cache .hypothesis
