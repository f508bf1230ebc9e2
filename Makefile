# `make demo` and `make test` set up what they need in .venv, once, and run.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test check lint types aot clean

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
