# `make demo` and `make test` set up what they need in .venv, once, and run.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test check lint types aot gpu clean

demo: .venv/demo.stamp  ## distil the embedded pair with ESR, then with full rollout, and compare
	$(BIN)/python -m esr_train.demo $(ARGS)

test: .venv/test.stamp  ## the test suite
	$(BIN)/python -m pytest $(ARGS)

check: lint types test  ## what to run before a commit

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test.stamp
	$(BIN)/mypy

aot: .venv/demo.stamp  ## compile the kernels without a GPU; fails on a register spill
	$(BIN)/python -m esr_kernels.aot $(ARGS)

# On a machine with a GPU, in an environment that has torch and the `bench` extra: PYTHON=python3 make gpu
gpu:  ## the tests that need a GPU, then both GPU benchmarks, into benchmarks/results/
	$(PYTHON) -m pytest tests -m gpu
	$(PYTHON) -m pytest benchmarks -k loss --device cuda --max-minutes 6 --json benchmarks/results/loss-cuda.json
	$(PYTHON) -m pytest benchmarks -k step --device cuda --max-minutes 6 --json benchmarks/results/step-cuda.json
	$(PYTHON) -m benchmarks.accuracy --device cuda --json benchmarks/results/accuracy-cuda.json

clean:
	rm -rf .venv build dist *.egg-info

.venv/pip.stamp:
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo.stamp: setup.py constraints.txt | .venv/pip.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# The test extra holds all that the demo needs.
.venv/test.stamp: setup.py constraints.txt | .venv/pip.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch .venv/demo.stamp $@
