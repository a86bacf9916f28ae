# Everything a developer runs. `make` alone lists the targets.
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP     = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
BIN     = $(VENV)/bin

# Images for `make e2e`. With Docker and kind: IMAGE_BUILD="docker build -t" IMAGE_LOAD="kind load docker-image".
OPERATOR_IMAGE ?= docker.io/local/finetune-operator:e2e
TRAINER_IMAGE  ?= docker.io/local/finetune-trainer:e2e
IMAGE_BUILD    ?= docker build -t
IMAGE_LOAD     ?= kind load docker-image

# Files of tests that run at a time, each in some 2 GiB of memory.
TEST_PROCESSES ?= 2
# Tests that are not to be run, such as 'and not long'.
LEAVE_OUT ?=

export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help install demo test check generate images e2e bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make the virtual environment and install everything into it

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt -e '.[operator,trainer,dev]'
	@touch $@

demo: install  ## tune the quickstart's model on this machine and ask it three questions, before and after
	@$(BIN)/python examples/demo.py

test: install $(VENV)/quantization/.installed  ## all tests that this machine can run; says what it left out and why
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m 'not cluster and not quantization and not ray and not api $(LEAVE_OUT)'
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m '(ray or api) $(LEAVE_OUT)' tests/integration
	PYTHONPATH=$(VENV)/quantization $(BIN)/python -m pytest -m quantization tests/unit/trainer

# In a folder of its own: PEFT imports bitsandbytes wherever it finds it, which takes every process of the other tests seconds.
$(VENV)/quantization/.installed: $(VENV)/.installed constraints.txt
	@$(PIP) install -c constraints.txt --no-deps --target $(@D) bitsandbytes
	@touch $@

check: install  ## format, lint, types, import contracts, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python crds/generate.py --check

generate: install  ## write the CRD, the chart's copy and the reference from the API's models
	$(BIN)/python crds/generate.py

images:  ## build the operator's and the trainer's image and load them into the cluster
	$(IMAGE_BUILD) $(OPERATOR_IMAGE) --target operator .
	$(IMAGE_BUILD) $(TRAINER_IMAGE) --target trainer .
	$(IMAGE_LOAD) $(OPERATOR_IMAGE) $(TRAINER_IMAGE)

e2e: install images  ## the whole way on the cluster that KUBECONFIG names
	FINETUNE_OPERATOR_IMAGE=$(OPERATOR_IMAGE) FINETUNE_TRAINER_IMAGE=$(TRAINER_IMAGE) \
	  $(BIN)/python -m pytest -m 'cluster $(LEAVE_OUT)' tests/e2e

bench: install  ## measure: trainer beside TRL, preparing data, kept teachers, API writes per job, operator with 1,000 and 5,000 jobs
	$(BIN)/python -m tests.bench

clean:  ## remove the virtual environment and what runs left here
	rm -rf $(VENV) .finetune $(foreach here,examples examples/*,$(here)/.finetune $(here)/*.status.yaml) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
