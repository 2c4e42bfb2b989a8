# The commands of this project. All they need on the machine is a Python >= 3.11 that can make virtual environments.
# VENV names another environment, PYTHON the interpreter to make it with, ARGS is handed on (make test ARGS='-k loss').

VENV ?= .venv
VENV_NEWEST ?= .venv-newest
PYTHON ?= $(shell tools/find_python.sh 3.11)
PYTHON_NEWEST ?= $(shell tools/find_python.sh 3.12)
ARGS ?=

# The servers of rollout.engine=vllm have an environment of their own.
VENV_VLLM ?= .venv-vllm

BIN = $(VENV)/bin
BIN_NEWEST = $(VENV_NEWEST)/bin
# The newest pair that is supported; pyproject.toml has the range.
MEGATRON_NEWEST = megatron-core==0.19.2
# For the kernels' test in Triton's interpreter, which needs no GPU; torch's CPU build comes without it.
TRITON = triton>=3.7,<4; platform_system == "Linux" and platform_machine == "x86_64"
INSTALL_INPUTS = pyproject.toml setup.py tools/install.sh
NEWEST_TESTS = tests/actor tests/weights tests/vocab_parallel tests/distributed tests/trainer/test_resume.py \
	tests/tools/test_convert_checkpoint.py tests/tools/test_convert_refusals.py

.DEFAULT_GOAL := help
.PHONY: help install install-vllm quickstart quickstart-vllm reproduce test test-slow test-newest check format gpu-check

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(VENV)/.installed ## the environment the other commands use, made once

$(VENV)/.installed: $(INSTALL_INPUTS)
	@tools/install.sh "$(PYTHON)" $(VENV)
	@touch $@

quickstart: $(VENV)/.installed ## train a small model end to end: TP 2 x PP 2, asynchronous A-3PO, minutes on a CPU
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/python -m megatron_a3po train examples/quickstart/config.yaml $(ARGS)

install-vllm: $(VENV_VLLM)/.installed ## an environment for vLLM servers, its CPU build where there is no GPU; gigabytes

$(VENV_VLLM)/.installed: tools/install_vllm.sh
	@tools/install_vllm.sh "$(PYTHON)" $(VENV_VLLM)
	@touch $@

quickstart-vllm: $(VENV)/.installed $(VENV_VLLM)/.installed ## the quickstart with a real vLLM server as rollout engine
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/python -m megatron_a3po train examples/quickstart/config.yaml rollout.engine=vllm rollout.launch=1 \
	    rollout.vllm_python=$(VENV_VLLM)/bin/python run_dir=runs/quickstart-vllm $(ARGS)

reproduce: $(VENV)/.installed ## the comparison behind A-3PO: each method at several ages of its samples; an hour on two cores
	$(BIN)/python examples/quickstart/prepare.py
	PYTHONPATH=. $(BIN)/python tools/reproduce.py examples/reproduce/config.yaml --out runs/reproduce $(ARGS)

test: $(VENV)/.installed ## every test this machine can run; lists what it had to leave out
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.installed ## the tests that take minutes, run before a release
	$(BIN)/python -m pytest -m slow $(ARGS)

test-newest: ## the actor's and the loss layer's tests on the newest supported Megatron-Core (Python 3.12)
	@if [ -n "$(PYTHON_NEWEST)" ]; then $(MAKE) --no-print-directory run-test-newest; else \
	    echo '!!! test-newest did NOT run: no Python 3.12 or newer that can make virtual environments was found.' >&2; \
	    echo '!!! Install one, or name it: make test-newest PYTHON_NEWEST=/path/to/python3.12' >&2; \
	    test "$$A3PO_REQUIRE_ALL" != 1; fi

.PHONY: run-test-newest
run-test-newest: $(VENV_NEWEST)/.installed
	$(BIN_NEWEST)/python -m pytest $(NEWEST_TESTS) $(ARGS)

$(VENV_NEWEST)/.installed: $(INSTALL_INPUTS)
	@tools/install.sh "$(PYTHON_NEWEST)" $(VENV_NEWEST) "$(MEGATRON_NEWEST)" '$(TRITON)'
	@touch $@

check: $(VENV)/.installed ## format, lint, types, layers, shell scripts; seconds
	@PATH="$(abspath $(BIN)):$$PATH" tools/check.sh

format: $(VENV)/.installed ## rewrite the sources in the house format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

gpu-check: ## everything that needs a GPU, on one GPU, with what is installed; writes one report of figures
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,python3) tools/gpu_check.py $(ARGS)
