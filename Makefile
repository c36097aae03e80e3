# `make` lists the targets. Everything happens in .venv, data and runs; nothing outside this folder is changed, but for
# the two Debian packages (python3-venv, python3-dev) that bootstrap.sh asks apt for where they are missing.

PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)
CPP := $(wildcard $(addprefix csrc/,*.cpp *.h */*.cpp */*.h))
# For which GPUs a wheel carries images; all others get PTX.
ARCHITECTURES ?= 80 86 89 90 100 120

.DEFAULT_GOAL := help
.PHONY: help setup build demo test fuzz kills exits sanitize test-matrix lint format bench bench-check gpu wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.packages ## create .venv with the pinned development environment

$(VENV)/.packages: constraints.txt pyproject.toml bootstrap.sh
	./bootstrap.sh $(PYTHON) $(VENV)
	python -m pip install --quiet --upgrade 'pip>=25.1'
	python -m pip install --quiet -c constraints.txt torch torchvision numpy setuptools ninja
	python -m pip install --quiet -c constraints.txt --group dev
	rm -f $(VENV)/.extension
	touch $@

build: $(VENV)/.extension ## build the C++ extension in place

# The first time with everything the program needs; later only what changed is compiled.
$(VENV)/.extension: $(VENV)/.packages setup.py $(CPP)
	@echo "compiling the C++ extension: about five minutes on two cores the first time"
	if [ -e $@ ]; then python setup.py --quiet build_ext --inplace; \
	else python -m pip install --quiet -c constraints.txt --no-build-isolation --editable '.[program]'; fi
	touch $@

demo: OUT ?= runs/demo
demo: build ## distil a student on Fashion-MNIST with uniform and with layer-wise rates, side by side
	lwkd distill --compare --data fashion-mnist --teacher cnn_16 --teacher-epochs 4 \
	    --student cnn_8 --student-limit 6000 --epochs 20 --policy relative --out $(OUT) --overwrite

# A process for each core. The tests of a file stay together, since they share what takes long to make.
test: build ## run all tests
	python -m pytest -n auto --dist loadfile

fuzz: EXAMPLES ?= 2000
fuzz: build ## every CPU op with EXAMPLES random inputs against the reference, other ones at every run
	LWKD_FUZZ=$(EXAMPLES) python -m pytest tests/ops/test_fuzz.py

kills: TRIES ?= 100
kills: build ## kill TRIES runs of `lwkd distill` at random moments; each must go on to the same bits
	LWKD_KILLS=$(TRIES) python -m pytest tests/program/test_kills.py

exits: TRIES ?= 40
exits: build ## end TRIES processes that trained together under gloo; each must exit with code 0
	LWKD_EXITS=$(TRIES) python -m pytest tests/rates/test_distributed.py -k end_with_code_0

# An extension of its own in build/sanitize. Python is not sanitized itself, so the libraries come before it, and
# libstdc++ with them, whose exceptions they watch. Leaks of the interpreter are not ours. Nothing is run from this
# folder's lwkd: pytest by name does not put it first on the path, as python -m would.
LIBRARY = $(shell $(or $(CXX),c++) -print-file-name=$(1))
SANITIZED ?= tests/ops/test_fuzz.py tests/ops/test_attention.py tests/ops/test_attention_errors.py \
    tests/ops/test_attention_maps.py tests/ops/test_hutchinson.py tests/ops/test_jacobian.py tests/ops/test_rates.py
sanitize: build ## the tests of the CPU ops with an extension that reports wrong memory use and undefined behaviour
	LWKD_SANITIZE=1 python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib \
	    --build-temp build/sanitize/temp
	LD_PRELOAD="$(foreach name,asan.so ubsan.so stdc++.so.6,$(call LIBRARY,lib$(name)))" ASAN_OPTIONS=detect_leaks=0 \
	    PYTHONPATH=$(abspath build/sanitize/lib) pytest -p no:cacheprovider --timeout 3600 $(SANITIZED)

# Each with its own .venv and copy of this folder in build/matrix, so that nothing here is built for another torch.
# TORCH_cpu is a build without CUDA, from wherever pip finds one: it brings no Triton, and gets no torchvision.
MATRIX ?= pinned newest cpu
TORCH_pinned ?= torch===2.11.0 torchvision===0.26.0
TORCH_newest ?= torch torchvision
TORCH_cpu ?= torch==2.13.0+cpu
test-matrix: $(addprefix matrix-,$(MATRIX)) ## all tests with torch 2.11.0, with the newest, and without CUDA and torchvision

matrix-%:
	$(PYTHON) -m venv build/matrix/$*
	mkdir -p build/matrix/$*/src
	git ls-files -z | xargs -0 cp --parents --update --preserve=timestamps -t build/matrix/$*/src
	grep -vE '^(torch|torchvision|triton)=' constraints.txt > build/matrix/$*/constraints.txt
	cd build/matrix/$*/src && export PATH="$(abspath build/matrix/$*/bin):$$PATH" && \
	python -m pip install --quiet --upgrade 'pip>=25.1' && \
	python -m pip install --quiet --upgrade -c ../constraints.txt $(TORCH_$*) numpy && \
	python -m pip install --quiet -c ../constraints.txt --group dev matplotlib pyyaml rich scikit-learn tensorboard \
	    torchmetrics typer $(if $(findstring torchvision,$(TORCH_$*)),timm) && \
	python -m pip install --quiet --no-build-isolation --no-deps --editable . && \
	python -m pytest -n auto --dist loadfile -rs

lint: build ## ruff, clang-format, mypy, and the direction of imports
	ruff check .
	ruff format --check .
	lint-imports --no-logo
	clang-format --dry-run -Werror $(CPP)
	mypy

format: setup ## format Python and C++ in place
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP)

bench: build ## run all benchmarks and keep their figures: benchmarks/results/MACHINE.json, and .md to read
	python -m pytest benchmarks/ops

bench-check: build ## no op has lost its speed; SHORT=1: a handful of cases in half a minute, as CI does
	python -m pytest benchmarks/ops $(if $(SHORT),--check-short,--check)

# Nothing is installed, no network, no .venv: the Python that holds torch, from a build in build/gpu. LWKD_COMMIT names
# the commit where the files were copied without their history.
gpu: OUT ?= runs/gpu
gpu: DATA ?= data
gpu: ## build, test and measure on this machine's GPU, in under ten minutes; results in OUT, Fashion-MNIST from DATA
	$(PYTHON) -m benchmarks.gpu.run --out $(OUT) --data $(DATA)

# What earlier builds left in build/lib.* would come along. Compiled objects stay, and images do not.
wheel: build ## build a wheel with images of all kernels: it needs no Triton on the GPUs in ARCHITECTURES
	rm -rf build/lib.* kernels/images
	python -m lwkd.kernels.compile --arch $(ARCHITECTURES) --ptx --out kernels/images
	python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	rm -rf kernels/images

clean: ## remove what was built; .venv and data stay
	rm -rf build dist kernels/images *.egg-info lwkd/*.so $(VENV)/.extension
