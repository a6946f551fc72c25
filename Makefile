# make demo   a video, a question, the stock cache and the compressed one side by side
# make test   lint, types and all tests
# make test-oldest   all tests on the oldest supported transformers and torch, in a .venv-oldest
# make bench  accuracy of all methods over true bytes (an hour on a free core, goes on where it stopped), then what time and memory
#             attention, single kernels and whole models take (a quarter of an hour): tables, JSON and a plot
# make bench-gpu  all that wants a GPU: tests and benchmarks (tools/gpu.sh)
# make support  runs the tests that show which model goes with which method, and writes docs/models.md
# make eval   Video-MME's and AgentNetBench's formats on the bundled models: dense and presets, one table and a plot; half an hour
# All set everything up by themselves (a .venv in this folder) and are quick the second time.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

OLDEST := transformers==5.2.* torch==2.9.*

.PHONY: test-oldest support help setup setup-dev demo bench bench-gpu eval test lint types format build clean

help:
	@echo "make demo | test | test-oldest | bench | bench-gpu | eval | support | lint | types | format | build | setup | setup-dev | clean"

# A stamp is renewed when pyproject.toml changes. The development set-up holds all that the plain one does.
.venv/.ready: pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" tools/setup.sh
	@touch $@

.venv/.ready-dev: pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" tools/setup.sh dev
	@touch .venv/.ready $@

.venv/.ready-bench: pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" tools/setup.sh dev,bench
	@touch .venv/.ready .venv/.ready-dev $@

.venv-oldest/.ready: pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" VENV=.venv-oldest tools/setup.sh dev $(foreach pin,$(OLDEST),'$(pin)')
	@touch $@

setup: .venv/.ready

setup-dev: .venv/.ready-dev

demo: .venv/.ready
	@$(BIN)/python -m mmkv.demos.ask

bench: .venv/.ready-bench
	@$(BIN)/python benchmarks/accuracy.py
	@$(BIN)/python benchmarks/pareto.py
	@$(BIN)/python benchmarks/decode_attention.py
	@$(BIN)/python benchmarks/kernels.py
	@$(BIN)/python benchmarks/generate.py
	@$(BIN)/python tools/readme.py

bench-gpu: .venv/.ready-bench
	@tools/gpu.sh
	@$(BIN)/python tools/readme.py

eval: .venv/.ready-bench
	@$(BIN)/python benchmarks/evaluation.py
	@$(BIN)/python tools/readme.py

lint: .venv/.ready-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || echo "lint: 'make format' would change some files (no failure)"

types: .venv/.ready-dev
	@$(BIN)/mypy

format: .venv/.ready-dev
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

test: lint types
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

test-oldest: .venv-oldest/.ready
	@OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n $(WORKERS)

support: .venv/.ready-dev
	@OMP_NUM_THREADS=1 $(BIN)/python tools/support.py

build: .venv/.ready-dev
	@$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv .venv-oldest build dist outputs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
