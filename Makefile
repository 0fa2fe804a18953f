# `make demo` and `make test` need Python 3.11 or newer, make and git; the rest they install.
# Everything is installed into .venv; the stamp inside makes the second call quick.

SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2
OUT    ?= out/demo

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help venv demo test test-slow test-crash lint format types docs bench wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(STAMP): pyproject.toml scripts/make_venv.sh
	@PYTHON="$(PYTHON)" bash scripts/make_venv.sh "$(VENV)"
	@touch $@

venv: $(STAMP) ## make .venv with everything that the other targets need

demo: $(STAMP) ## label 200 scenes with the model that ships, and print a few answers
	@bash scripts/demo.sh "$(BIN)" "$(OUT)"

test: $(STAMP) ## every test that needs no GPU and no patience
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test-slow: $(STAMP) ## the tests that take longer
	$(BIN)/python -m pytest -q -m "slow and not gpu"

test-crash: $(STAMP) ## inject at least 500 faults at every step of a job, and count the rows
	CRASH_MIN_FAULTS=500 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not gpu" tests/crash

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## rewrite the files as ruff would
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy
	$(BIN)/mypy

docs: $(STAMP) ## rewrite the tables in the Markdown files
	$(BIN)/python scripts/write_docs.py

bench: $(STAMP) ## the benchmark with the model that ships, on this machine
	$(BIN)/python scripts/bench.py --model demo --work caption --rows 64

wheel: $(STAMP) ## build the wheel into dist/
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) out dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
