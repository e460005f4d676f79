# `make quick` and `make test` set everything up themselves, on a machine that has only Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: quick test slow chaos lint types check clean

quick: $(VENV)/.installed
	$(BIN)/python train_sota.py --quick

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not chaos"

slow: $(VENV)/.installed-peers
	$(BIN)/python -m pytest -m slow

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m chaos

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

check: test lint types

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/.installed-peers: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --editable ".[peers]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
