# Two commands on a fresh machine with Python 3.11 and make:  make run   make test
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= runs/quickstart
STACK  ?= runs/stack
SHELL  := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help install run test lint format typecheck unit bench bench-gpu audit-deps up status down clean

help:            ## Show this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(STAMP)  ## Make .venv with the exact versions of infra/constraints.txt

$(STAMP): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e '.[dev]'
	@$(BIN)/python -m flows.prefect_database
	@touch $(STAMP)

run: $(STAMP)      ## Run the quickstart study (embedded default) and say where report and UIs are
	@$(BIN)/fedmentor run --config infra/configs/quickstart.yaml --out $(OUT)

test: lint typecheck unit  ## Lint, types and the whole test suite

lint: $(STAMP)     ## ruff, lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)  ## mypy --strict on fedmentor_core
	$(BIN)/mypy

unit: $(STAMP)     ## pytest
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=8

format: $(STAMP)   ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)    ## Benchmarks on the processor; results in runs/bench (BENCH="--only startup --quick")
	@$(BIN)/python tests/benchmarks/run.py $(BENCH)

bench-gpu: $(STAMP)  ## The benchmarks that need a GPU; refused where there is none
	@$(BIN)/python tests/benchmarks/run.py --gpu --out runs/bench-gpu $(BENCH)

audit-deps: $(STAMP)  ## Known vulnerabilities of the pinned packages (pip-audit); skipped where its database is out of reach
	@$(BIN)/python infra/audit_deps.py

up: $(STAMP)       ## Start the stack on this machine: Prefect, MLflow, S3, a worker per site (UP="--site a --site b")
	@$(BIN)/fedmentor up --dir $(STACK) $(UP)

status: $(STAMP)   ## Ask every service of the stack
	@$(BIN)/fedmentor status --dir $(STACK)

down: $(STAMP)     ## Stop the stack; its data stays
	@$(BIN)/fedmentor down --dir $(STACK)

clean:           ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
