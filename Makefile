# Every target does its own set-up: finds a Python, makes .venv, installs, runs. Needs make, a POSIX shell and Python 3.12 or 3.13.
# PYTHON=/path/to/python3.12 names the Python to make .venv with; WORKERS is the number of test processes.

PYTHON ?=
WORKERS ?= 2
export PYTHON

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
PROMPT := Once upon a time

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test fast check format format-check lint types clean

help:  ## say what there is
	@echo "make <target>:"
	@sed -n 's/^\([a-z-]*\):.*  ## /  \1\t/p' Makefile | expand -t 16

.venv/installed: pyproject.toml constraints.txt scripts/set_up_venv.sh scripts/find_python.sh
	@sh scripts/set_up_venv.sh

demo: .venv/installed  ## show how the built-in model is routed, then let it write
	$(BIN)/hybrid-jax routing demo
	$(BIN)/hybrid-jax generate demo --prompt "$(PROMPT)"

test: .venv/installed  ## every test that runs without an accelerator
	$(PYTEST)

fast: .venv/installed  ## the tests not marked slow
	$(PYTEST) -m "not slow"

check: format-check lint types fast  ## format, lint, types and the fast tests: before every commit

format: .venv/installed  ## rewrite the files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

format-check: .venv/installed
	$(BIN)/ruff format --check .

lint: .venv/installed
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy

clean:  ## remove the environment and all caches
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
