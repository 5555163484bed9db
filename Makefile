# `make demo` and `make test` set up .venv first; nothing else is needed beforehand but Python 3.10 or newer.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --editable
PYTEST = $(BIN)/python -m pytest

.PHONY: demo install test test-floors long soak bench-gpu lint docs check clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[$(EXTRAS)]'
	touch $@

install: $(VENV)/.installed  ## the environment; EXTRAS=dev,docs,deployments for everything at once

demo: $(VENV)/.installed  ## train on the bundled digits, tracked in ./mlflow.db
	$(BIN)/shufflenet train

test: $(VENV)/.installed  ## the fast tests, two files at a time
	$(PYTEST) -n 2 --dist loadfile

test-floors:  ## the fast tests with the oldest dependencies that are allowed, in .venv-floors
	PYTHON=$(PYTHON) .ci/floors

long: $(VENV)/.installed  ## the tests that take minutes: servers, `mlflow run`, killed processes
	$(PYTEST) -m 'long and not alone' -n 2 --dist loadfile; together=$$?; $(PYTEST) -m 'long and alone' && exit $$together

soak: $(VENV)/.installed  ## an hour of kills, outages and full disks around several runs; SOAK='--minutes 5 --seed 7'
	$(BIN)/python -m tests.support.soak $(SOAK)

bench-gpu: $(VENV)/.installed  ## all that a GPU matters to, into gpu.json; BENCH='--quick' to try it, also without one
	$(INSTALL) '.[$(EXTRAS),bench]'
	$(BIN)/python benchmarks/gpu.py $(BENCH)

lint: $(VENV)/.installed  ## style, formatting, who imports whom, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

docs: $(VENV)/.installed  ## the site, into site/
	$(BIN)/mkdocs --version > /dev/null 2>&1 || $(INSTALL) '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

check: lint test docs long  ## everything

clean:
	rm -rf $(VENV) .venv-floors site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
