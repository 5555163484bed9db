# `make demo` and `make test` set up .venv first; nothing else is needed beforehand but Python 3.10 or newer.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test long lint docs check clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## train on the bundled digits, tracked in ./mlflow.db
	$(BIN)/shufflenet train

test: $(VENV)/.installed  ## the fast tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

long: $(VENV)/.installed  ## the tests that take minutes: servers, `mlflow run`, killed processes
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.installed  ## style, formatting, who imports whom, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	touch $@

docs: $(VENV)/.installed-docs  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

check: lint test docs long  ## everything

clean:
	rm -rf $(VENV) site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
