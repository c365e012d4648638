# Every target except help and clean first sets up .venv (scripts/bootstrap.py), which is instant once it is done.
PY := .venv/bin/python
BOOT := $(or $(PYTHON),python3)
# Two workers with one thread each use both cores of a small machine; more threads than cores stall torch.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n 2 --dist worksteal -m "not gpu and not net and not clients"
.DEFAULT_GOAL := help
.PHONY: help setup check test test-all prose demo bench bench-gpu peft-suite test-clients test-vllm hook clean

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z-]+:.*## / { printf "  make %-12s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup:  ## set up .venv with everything the other targets need
	@command -v $(BOOT) >/dev/null || { echo "setup: error: $(BOOT) is not on PATH; install Python 3.10 or newer" >&2; exit 1; }
	@$(BOOT) scripts/bootstrap.py

check: setup  ## check lint, format, types and architecture: required for a commit
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache --no-logo
	$(PY) -m pytest -q -n 0 tests/test_architecture.py tests/architecture
	$(PY) scripts/structure.py
	@printf 'prose: '; $(PY) scripts/prose_check.py -s | sed -n 1p

test: setup  ## run today's sample of the tests (CASES=sample+rest:3 adds a tenth of the others; SEED=20261202 repeats a day)
	$(PYTEST) --cases $(or $(CASES),sample) $(SEED:%=--cases-seed %)

test-all: setup  ## run all tests that need no GPU, including the slow ones
	$(PYTEST)

prose: setup  ## report idioms and private terms in the prose of the repository, or of ARGS; problems do not fail it
	@$(PY) scripts/prose_check.py $(ARGS) || [ $$? -eq 1 ]

demo: setup  ## fine-tune a small language model on a text and compare it with the base (ARGS="--base-matmul int8")
	$(PY) scripts/demo.py $(ARGS)

bench: setup  ## run the benchmarks, in less than an hour; each appends rows to benchmarks/results
	$(PY) benchmarks/run_all.py $(ARGS)

bench-gpu: setup  ## run the GPU benchmarks on one H100; append to benchmarks/results and update the table
	$(PY) benchmarks/bench_gpu.py $(ARGS)

peft-suite: setup  ## run PEFT's published tests on lorakit.peft (downloads its source distribution)
	$(PY) scripts/peft_suite.py $(ARGS)

test-vllm: setup  ## serve exported adapters in real vLLM on a CPU (installs 3.4 GB into .venv-vllm) and update the table of runtimes
	$(PY) scripts/rules_in_vllm.py
	$(PY) scripts/vllm_resolver.py
	OMP_NUM_THREADS=1 $(PY) scripts/runtimes_table.py $(ARGS)

test-clients: setup  ## test `lorakit serve` with lm-eval, langchain-openai and, if installed, Chromium (installs 0.4 GB into .venv-clients)
	$(PY) scripts/environments.py
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false .venv-clients/bin/python -m pytest -m clients -rs tests/serve $(ARGS)

hook: setup  ## run `make check` before every commit
	@path=$$(git rev-parse --git-path hooks/pre-commit) && printf '#!/bin/sh\nexec make check\n' > "$$path" && chmod +x "$$path" && echo "installed $$path"

clean:  ## remove .venv, .venv-clients, .venv-vllm, caches and built files (not runs/)
	rm -rf .venv .venv-clients .venv-vllm build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
