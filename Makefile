# `make` lists the targets. Everything happens in .venv; nothing outside this folder is changed, but for the two Debian
# packages (python3-venv, python3-dev) that bootstrap.sh asks apt for where they are missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.cpp csrc/*.h)
OUT ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup build demo test lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.packages ## create .venv with the pinned development environment

$(VENV)/.packages: constraints.txt pyproject.toml bootstrap.sh
	./bootstrap.sh $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision numpy setuptools wheel ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --editable '.[program]'
	touch $@ $(VENV)/.extension

build: $(VENV)/.extension ## build the C++ extension in place

$(VENV)/.extension: $(VENV)/.packages setup.py $(CPP)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

test: build ## run all tests
	$(BIN)/python -m pytest

lint: build ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: setup ## format Python and C++ in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: build ## run the microbenchmarks
	$(BIN)/python -m pytest benchmarks

clean: ## remove what was built; .venv and data stay
	rm -rf build dist *.egg-info lwkd/*.so $(VENV)/.extension
