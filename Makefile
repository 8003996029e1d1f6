.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Twice the processors of a small machine: tests wait for outages, locks and other processes.
WORKERS ?= 4
# A worker that has nothing left takes from another one; until then each keeps whole files, and so
# makes what a file's tests share once.
SHARED := --dist worksteal
# Where it is set, as in images of containers, each of the tests' children compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo docs test test-slow test-oldest test-postgresql bench snapshots check format build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Each stamp stands for the environment with the dependencies of its name; it depends on
# pyproject.toml only.
$(VENV)/demo.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,litellm,otel]'
	@touch $@

demo: $(VENV)/demo.stamp ## record a generated sample in an embedded database and show its statistics
	@$(BIN)/python examples/demo.py

test: $(VENV)/dev.stamp ## the tests, both backends, with branch coverage (about 5 minutes on 2 cores)
	$(BIN)/python -m pytest $(SHARED) -n $(WORKERS) -m "not slow" --cov --cov-report=term

test-slow: $(VENV)/dev.stamp ## the tests that take longer, and all values and backends of the others
	$(BIN)/python -m pytest $(SHARED) -n $(WORKERS) -m slow

test-oldest: $(VENV)/dev.stamp ## the tests with the lowest versions that pyproject.toml allows
	$(BIN)/python -m tests.support.oldest

test-postgresql: $(VENV)/dev.stamp ## the tests on PostgreSQL alone
	$(BIN)/python -m pytest $(SHARED) -n $(WORKERS) -m "not slow" -k postgres

bench: $(VENV)/dev.stamp ## compare the store with the bare drivers and the original, in one table
	$(BIN)/python -m benchmarks

snapshots: $(VENV)/dev.stamp ## rewrite the committed schema of both backends, after a new revision
	$(BIN)/python -m tests.support.snapshot

check: $(VENV)/dev.stamp docs ## check formatting, lint, types and the order of imports, build the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

# Its theme announces the end of mkdocs 1 each time.
docs: $(VENV)/dev.stamp ## build the documentation, as a site in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(VENV)/dev.stamp ## format, and fix the lint errors that can be fixed automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/dev.stamp ## build the wheel and upgrade an empty database with it, outside the checkout
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python tests/support/try_wheel.py dist/*.whl

clean: ## remove everything that was built
	rm -rf $(VENV) dist build .lynkr .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
