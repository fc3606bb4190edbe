# Needs Python 3.11 or newer and a C/C++ compiler; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,
PYTEST := $(BIN)/python -m pytest
HALVES := $(BIN)/python -m tests.halves
# After installation nothing goes out: not the frameworks' telemetry, not a model hub, not a tokenizer download.
export HF_HUB_OFFLINE := 1
export LANGSMITH_TRACING := false

.DEFAULT_GOAL := help
.PHONY: help demo test check bench proof soak static namespaces unit clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## install what is needed, then run LangChain and LlamaIndex on two shared workers
	$(BIN)/python examples/demo.py

check: $(VENV)/.dev static unit ## format, lint, types, import rules and the tests that need no engine (two minutes)

test: $(VENV)/.dev static ## check, and every test on the real engine, long loops at a tenth, with the coverage gate
	$(HALVES) -m "not proof" --cov

proof: $(VENV)/.dev static ## every test with every full count
	LLAMA_WORKER_PROOF=1 $(HALVES) -m "proof or not proof"

soak: $(VENV)/.dev ## ten minutes (SECONDS=600) of load from all sides while the model is reloaded
	$(BIN)/python -m tests.worker.soak --seconds $(or $(SECONDS),600)

bench: $(VENV)/.dev ## measure, side by side with the peers, and write docs/benchmarks.*
	$(BIN)/python -m benchmarks

clean: ## remove caches and build outputs, keep the environment
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage*

static: $(VENV)/.dev namespaces
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# One stray __init__.py here would hide llama_index.core, or every other integration, from Python.
namespaces:
	@found=$$(find adapters/llama_index -maxdepth 2 -name __init__.py); \
	test -z "$$found" || { echo "namespace packages must have no __init__.py: $$found"; exit 1; }

unit: $(VENV)/.dev
	$(PYTEST) -m "not engine and not proof"

# The stamps make a second run skip the installation.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "llama-worker needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The demo models come last, and without their dependencies: an application and several GB of CUDA.
define install
@echo "Installing; the first time llama.cpp is compiled, which takes some minutes."
$(BIN)/python -m pip install --quiet --editable '.[$(1)]'
$(BIN)/python -m pip install --quiet --no-deps -r requirements-demo.txt
endef

$(VENV)/.demo: pyproject.toml requirements-demo.txt | $(VENV)/bin/python
	$(call install,langchain$(comma)llama-index$(comma)demo)
	@touch $@

$(VENV)/.dev: pyproject.toml requirements-demo.txt | $(VENV)/bin/python
	$(call install,dev)
	@touch $@ $(VENV)/.demo
