# Everything runs in .venv, which these rules make by themselves from Python 3.11 and constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: demo test check lint clean

demo: $(STAMP)
	$(BIN)/conclave demo

test: $(DEV_STAMP)
	$(BIN)/python -m pytest -q

check: $(DEV_STAMP) lint test

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint k8s/Dockerfile
	$(BIN)/python -m k8s.lint k8s/rendered k8s/cluster k8s/weights k8s/monitoring

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable . --constraint constraints.txt
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
