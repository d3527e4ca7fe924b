# Every target sets up .venv by itself, once. To use an interpreter that already has vLLM, as it is
# and with nothing installed into it: make gpu-test PYTHON=python3
.DEFAULT_GOAL := help
.PHONY: help demo test gpu-test gpu-test-slow hopper test-compat bench lint format env

ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
CLANG_FORMAT := .venv/bin/clang-format
ENV := env
else
# Not installed there, so let Python see the package, and vLLM its entry points.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
CLANG_FORMAT := clang-format
ENV := vllm_flashmla_backend.egg-info
endif

# GPU tests by files, JOBS of them at once; those that start many engines begin first.
JOBS ?= 4
ENGINE_TESTS := $(wildcard tests/test_vllm_*.py)
GPU_TESTS := $(ENGINE_TESTS) $(filter-out $(ENGINE_TESTS),$(wildcard tests/test_*.py))
XDIST := -n $(JOBS) --dist loadfile --no-loadscope-reorder

CUDA_SOURCES := $(shell find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h')

help: ## this list
	@grep -hE '^[a-z-]+:.* ## ' $(MAKEFILE_LIST) | awk -F ':.* ## ' '{printf "make %-13s %s\n", $$1, $$2}'

demo: $(ENV) ## vLLM answers 64 prompts through FLASHMLA, on this machine's GPU or CPU
	$(PYTHON) -m vllm_flashmla_backend.cli demo

test: $(ENV) ## every test that this machine can run: without a Hopper GPU, those that need one are skipped
	$(PYTHON) -m pytest

gpu-test: hopper ## the tests that need a Hopper GPU, but for the slow ones; JOBS=4 files of them at once
	@if $(PYTHON) -c 'import xdist' 2> /dev/null; then xdist='$(XDIST)'; \
	else echo 'gpu-test: no pytest-xdist in $(PYTHON): one test after another'; fi; \
	set -x; $(PYTHON) -m pytest -m 'gpu and not slow' $$xdist $(GPU_TESTS)

gpu-test-slow: hopper ## the slow ones, which take minutes each and want the GPU for themselves
	$(PYTHON) -m pytest -m 'gpu and slow'

hopper: $(ENV)
	@$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() and \
		torch.cuda.get_device_capability()[0] == 9 else 'GPU tests need a Hopper GPU, and torch sees none')"

test-compat: $(ENV) ## the hooks of this package in vLLM 0.26.0, 0.30.0 and 0.33.0: downloads their wheels, once
	$(PYTHON) tools/compat.py $(RELEASES)

bench: $(ENV) ## our kernels against their peers on this machine's Hopper GPU, and plots
	$(PYTHON) -m vllm_flashmla_backend.cli bench $(BENCH)

lint: $(ENV) ## ruff and clang-format, changing nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(CUDA_SOURCES)

format: $(ENV) ## ruff and clang-format, in place
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CUDA_SOURCES)

env: ## .venv with vLLM (for the GPU or the CPU), this package and its tools
	@tools/setup_env.sh

vllm_flashmla_backend.egg-info: pyproject.toml
	$(PYTHON) setup.py -q egg_info
