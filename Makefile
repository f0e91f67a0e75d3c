# Everything a developer or a newcomer runs. Works from a bare clone with Python 3.11 or newer and its venv module.

PYTHON ?= python3
# Passed on: make serve ARGS="--decode 2", make test ARGS="-k router".
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PACKAGES := segue engine kv_transfer prefill_worker decode_worker router deploy bench tests
MODEL := $(or $(SEGUE_HOME),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/segue)/models/smollm2-135m-instruct

.DEFAULT_GOAL := help
.PHONY: help install serve test test-deploy test-multihost manifests proto format clean

help: ## Show what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Set up .venv and fetch the default model, if they are not there
	@test -d "$(MODEL)" || $(BIN)/segue models pull

serve: install ## Start a cluster on this machine; ARGS="..." goes to segue up
	@$(BIN)/segue up $(ARGS)

test: install ## Run every check and test, as CI does; ARGS="..." goes to pytest
	@echo "== format";       $(BIN)/ruff format --check --quiet $(PACKAGES) || { echo "run: make format"; exit 1; }
	@echo "== lint";         $(BIN)/ruff check --quiet $(PACKAGES)
	@echo "== types";        $(BIN)/mypy
	@echo "== import rules"; $(BIN)/lint-imports --no-logo
	@echo "== proto";        $(BIN)/python -m pytest -q --no-header tests/unit/test_proto_stubs.py
	@echo "== unit tests";   $(BIN)/python -m pytest -q --no-header -n 2 --dist loadfile tests/unit $(ARGS)
	@echo "== whole clusters"; $(BIN)/python -m pytest -q --no-header tests/integration tests/chaos tests/e2e $(ARGS)

test-deploy: install ## Check chart, manifests and image with real tools, which it fetches; ARGS="..." goes to pytest
	@$(BIN)/python tests/deploy/get_tools.py
	@$(BIN)/python -m pytest -q --no-header -n 2 --dist loadfile tests/deploy $(ARGS)

test-multihost: install ## Run a Ray cluster over hosts in network namespaces, which takes root; ARGS="..." goes to pytest
	@$(BIN)/python -m pytest -q --no-header tests/multihost $(ARGS)

manifests: $(STAMP) ## Write deploy/kubernetes, the settings in the chart's schema and docs/metrics.md anew
	@$(BIN)/python tests/deploy/get_tools.py
	@$(BIN)/python -m deploy.chart_schema
	@$(BIN)/python -m deploy.metrics_reference
	@$(BIN)/python -m tests.deploy.manifests

proto: $(STAMP) ## Write the stubs in segue/v1 anew from proto/
	@PYTHON=$(BIN)/python proto/generate.sh

format: $(STAMP) ## Format the code and fix what the linter can fix
	@$(BIN)/ruff check --fix --quiet $(PACKAGES)
	@$(BIN)/ruff format --quiet $(PACKAGES)

clean: ## Remove .venv, builds and caches (models and logs stay)
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt $(wildcard engine/kernels/csrc/* kv_transfer/csrc/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Segue needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { \
	  rm -rf .venv; echo "Python's venv module is missing; on Debian: apt install python3-venv"; exit 1; }
	@echo "installing Segue and its tools into .venv; the first time takes a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
