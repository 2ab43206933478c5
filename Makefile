# make demo | test | lint | help — each sets up what it needs in .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Oversubscribed threads made training ten times slower: libraries get one, torch is told its own.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint clean
help:
	@echo "make demo   eight teachers on agents teach a student (under 3 minutes); see runs/latest/report.html"
	@echo "make test   the tests"
	@echo "make lint   ruff, mypy, import-linter"
	@echo "make clean  remove the virtual environment and caches"

demo: $(STAMP)
	$(BIN)/fedsa demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 --package edge_teacher
	$(BIN)/lint-imports

# torch first, by its exact version: PyPI's build for Linux brings gigabytes of CUDA. The CPU build is
# taken from PyTorch's own index where that can be reached, else from wherever pip is set up to look.
TORCH       := $(shell grep '^torch==' constraints.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
REACHABLE    = $(PYTHON) -c 'import urllib.request as u; u.urlopen("$(TORCH_INDEX)/", timeout=5)' 2>/dev/null
$(STAMP): setup.py constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@if $(REACHABLE); then index="--index-url $(TORCH_INDEX)"; else index=""; \
	  echo "make: $(TORCH_INDEX) cannot be reached; taking $(TORCH) from pip's own index"; fi; \
	  $(BIN)/pip install --quiet $$index '$(TORCH)'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
