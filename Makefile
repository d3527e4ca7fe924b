# Every target sets up .venv by itself, once. To use an interpreter that already has vLLM, as it is
# and with nothing installed into it: make gpu-test PYTHON=python3
.DEFAULT_GOAL := help
.PHONY: help demo test gpu-test test-compat bench lint format env

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

CUDA_SOURCES := $(shell find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h')

help: ## this list
	@grep -hE '^[a-z-]+:.* ## ' $(MAKEFILE_LIST) | awk -F ':.* ## ' '{printf "make %-11s %s\n", $$1, $$2}'

demo: $(ENV) ## vLLM answers 64 prompts through FLASHMLA, on this machine's GPU or CPU
	$(PYTHON) -m vllm_flashmla_backend.cli demo

test: $(ENV) ## every test that this machine can run: without a Hopper GPU, those that need one are skipped
	$(PYTHON) -m pytest

gpu-test: $(ENV) ## the tests that need a Hopper GPU
	@$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() and \
		torch.cuda.get_device_capability()[0] == 9 else 'make gpu-test needs a Hopper GPU, and torch sees none')"
	$(PYTHON) -m pytest -m gpu

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
