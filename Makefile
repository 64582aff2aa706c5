# Two commands: `make quickstart` and `make test`. Both make .venv first, once; afterwards only when
# pyproject.toml or constraints.txt change. Needed beforehand: git, make, Python 3.11 or newer with pip.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first interpreter that is new enough; choose another with `make PYTHON=/path/to/python3.12 test`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup quickstart quickstart-ablations test test-slow lint clean

help:
	@echo "make quickstart            the whole chain on two CPU cores: about ten minutes"
	@echo "make quickstart-ablations  the same with the blind and the untrained-encoder runs"
	@echo "make test                  lint, types and tests"
	@echo "make test-slow             the tests that take minutes"
	@echo "make lint                  ruff and mypy only"
	@echo "make setup                 only .venv"

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 2; fi
	@if [ ! -x $(BIN)/python ]; then \
		echo "making $(VENV) with $(PYTHON)"; \
		$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV); }; fi
	@# A Python without ensurepip makes an environment without pip: then the outer pip installs into it.
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then pip="$(BIN)/python -m pip"; \
		else pip="$(PYTHON) -m pip --python $(BIN)/python"; fi; \
		echo "installing (once: some minutes)"; \
		$$pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart.sh

quickstart-ablations: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart.sh --ablations

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" || [ $$? -eq 5 ]  # 5: none is marked slow

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
