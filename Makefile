# Every target sets up .venv by itself; a machine with make, Python 3.11 or later and its venv module is enough.
#
#   PYTHON=python3.12 make test                                        another interpreter (before .venv exists)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu make quickstart   a CPU torch where PyPI's would bring CUDA

PYTHON ?= python3
TORCH_INDEX ?=
# Two cores are what the tests are timed for: a process each, with one thread, as tensors this small gain nothing from more.
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint bench docs clean

help:
	@echo "make quickstart   train on handwritten digits and write a report, about five minutes on two cores"
	@echo "make test         the tests, without the slow ones"
	@echo "make test-all     all the tests"
	@echo "make lint         ruff and pyright"
	@echo "make bench        every script in benchmarks/"
	@echo "make docs         the documentation, in docs/_build"
	@echo "make clean        remove caches and the built documentation (never .venv, runs or pairs)"

quickstart: .venv/.base
	$(BIN)/fluvial quickstart

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-all: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/.dev
	@set -e; for script in $(sort $(wildcard benchmarks/[a-z]*.py)); do \
		echo "== $$script"; $(BIN)/python $$script; done

docs: .venv/.docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build
	@echo "open docs/_build/index.html"

clean:
	rm -rf docs/_build build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks examples docs -type d -name __pycache__ -exec rm -rf {} + 2>/dev/null || true

# What is installed, as stamps: the package alone, then with what the tests need, then with what the site needs.
# torch goes in first and alone, so that nothing else chooses its build.
.venv/.base: $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fluvial needs Python 3.11 or later; \
	this is " + sys.version.split()[0] + ". Choose another: PYTHON=python3.12 make")'
	@test -x $(BIN)/python || { echo "Making .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing torch (the largest part: a minute or more)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "Installing fluvial"
	@$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.base
	@echo "Installing what the tests need"
	@$(PIP) -e '.[dev,diffusers,data]'
	@touch $@

.venv/.docs: .venv/.base
	@echo "Installing what the documentation needs"
	@$(PIP) -e '.[docs]'
	@touch $@
