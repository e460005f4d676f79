# `make quick` and `make test` set up everything they need on a machine that has only Python.
# python3 may be too old (a Mac's own) or too new (for torch), so others beside it are tried, too.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && \
	echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
.PHONY: quick test slow chaos lint types check clean

quick: $(VENV)/.installed
	$(BIN)/python train_sota.py --quick

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not chaos"

slow: $(VENV)/.installed-peers
	$(BIN)/python -m pytest -m "slow or peers"

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m chaos

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

check: test lint types

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.14 found: install one, or give its path:" \
		"make PYTHON=/path/to/python3" >&2; exit 2; }
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
