# Everything lives in .venv and .cache of this folder; nothing is installed elsewhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CACHE_DIR := $(CURDIR)/.cache/pip
export XDG_CACHE_HOME ?= $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test unit check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Caravan needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: setup  ## from raw text to answered requests, on this machine
	$(BIN)/caravan run pipelines/recipes/quickstart.yaml

test: setup  ## the whole suite
	$(BIN)/python -m pytest -q --durations=15

unit: setup  ## without Ray clusters, servers and process groups
	$(BIN)/python -m pytest -q -m 'not integration'

check: setup  ## style, types and the three floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

clean:
	rm -rf $(VENV) .cache .caravan
