# Needs Python ≥ 3.11, make and a C compiler (one dependency is built from source). `make help` lists the targets.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
# `make train steps=50` works like `make train ARGS="steps=50"`: what is set on make's command line goes to the run.
SETTINGS := $(filter-out PYTHON=% PIP_ARGS=% ARGS=%,$(MAKEOVERRIDES))

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format bench clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## .venv with everything: about two minutes and 4 GB

train: $(READY) ## trains; settings as in `make train seed=1 buffer.max_staleness=2`
	@$(BIN)/python scripts/train_async.py $(ARGS) $(SETTINGS)

test: $(READY) ## all tests but the slow ones; ARGS="-k buffer" and the like go to pytest
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY) ## style, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(READY) ## rewrites the code in the one style, mends what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## every script in benchmarks/
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
