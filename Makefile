# Each target makes its own virtual environment and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow test-gpu lint types clean

demo: $(VENV)/.demo  ## Train and compare three methods on the built-in example
	$(VENV)/bin/fedelta compare --resume

test: $(VENV)/.dev  ## Everything but the slow tests, at most four of them side by side
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/.dev  ## The slow tests alone
	$(VENV)/bin/python -m pytest -m slow

test-gpu: $(VENV)/.dev  ## The tests that need a CUDA device; FEDELTA_TEST_DEVICE=cpu runs them on the CPU instead
	$(VENV)/bin/python -m pytest -m gpu tests/gpu

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.dev
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fedelta needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first: asked for by its pinned version, it is the build that this platform's index offers.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing fedelta and its dependencies into $(VENV) (a minute or two)"
	$(PIP) torch
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[demo,dev,flower,generation,harness,quantization]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
