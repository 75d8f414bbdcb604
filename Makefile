# Everything a person types. `make help` lists the targets.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKSPACE ?= workspace/demo
CHECKPOINT ?=
RECIPE ?= jobs/recipes/compare_food_kitchen.toml
# Of the recipes of these data, where the files lie beside the repository; else data.raw_uri is the recipe's own.
DATA ?= $(if $(filter %/compare_food_kitchen.toml %/compare_ablations.toml,$(RECIPE)),$(wildcard ../shared/data/amazon-food-kitchen))
PORT ?= 8000
# Of `make submit`: which job, with which recipe (CONFIG= for those that take none), under which id; more flags for it.
JOB ?= pipeline
CONFIG ?= jobs/recipes/demo.toml
ID ?=
ARGS ?=
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo compare serve submit test test-slow test-cluster bench lint clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(INSTALLED) ## Create .venv and install the locked dependencies.

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version), needed: Python 3.11 (make PYTHON=/path/to/python3.11)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) lacks the venv module: install it (Debian: apt-get install python3.11-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked dependencies into $(VENV) (a few minutes the first time) ..."
	@# torch first and by its exact version: as somebody's dependency it could be another build.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[embedded,dev]'
	@# TorchRec names the CUDA build of fbgemm, half a gigabyte; the extra has brought the CPU's.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt torchrec
	@touch $@

demo: $(INSTALLED) ## Generate data, prepare, extract, train, evaluate; print the comparison.
	$(BIN)/python -m jobs.pipeline --config jobs/recipes/demo.toml --workspace_uri "$(WORKSPACE)"

compare: $(INSTALLED) ## Compare backbones, knowledge and ablations over seeds: RECIPE (on DATA, in WORKSPACE).
	$(BIN)/python -m jobs.compare --config "$(RECIPE)" $(if $(DATA),--data.raw_uri "$(DATA)") $(if $(filter-out file,$(origin WORKSPACE)),--workspace_uri "$(WORKSPACE)")

serve: $(INSTALLED) ## Serve the checkpoint of WORKSPACE (or CHECKPOINT) on PORT.
	$(BIN)/python -m serve $(if $(CHECKPOINT),--checkpoint_uri "$(CHECKPOINT)",--workspace_uri "$(WORKSPACE)") --auth off --port $(PORT)

submit: $(INSTALLED) ## Run JOB with CONFIG (and ARGS) on the cluster of RAY_API_SERVER_ADDRESS, as job ID.
	$(BIN)/ray job submit --working-dir . $(if $(ID),--submission-id "$(ID)") -- python -m jobs.$(JOB) $(if $(CONFIG),--config "$(CONFIG)") $(ARGS)

test: $(INSTALLED) ## Run the linter, the type checker and the test suite.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED) ## Run the tests that take minutes each: a compiled model, a lost node.
	$(BIN)/python -m pytest -m slow

test-cluster: $(INSTALLED) ## Run a pipeline on hosts in namespaces of this machine, links cut (root; Debian: openssh-server iproute2 rsync).
	$(BIN)/python -m pytest -m hosts tests/integration/test_cluster_hosts.py

bench: $(INSTALLED) ## Run all benchmarks that fit this machine; print goal, measured, met.
	$(BIN)/python -m benchmarks

lint: $(INSTALLED) ## Run the linter alone, and mend what it can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the virtual environment and the demo's output.
	rm -rf $(VENV) workspace/demo
