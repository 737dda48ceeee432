# `make demo` and `make test` do all their own set-up in .venv; they need Python 3.10 or newer with pip and venv, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
# Marks of tests that are left out.
NOT ?= slow
# Two processes of one thread each: quicker here than one of two, and files with one model stay in one process.
PYTEST ?= -m "not ($(NOT))" -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow check docs install mutants figures

demo: $(VENV)/.installed
	$(BIN)/mechedit demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PYTEST)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The docs as a site in site/, without a network and with every warning an error; `mechedit docs` opens it.
docs: $(VENV)/.installed
	$(BIN)/python docs/theme/build.py

# Every figure and table that this machine can make, hours of them; MODEL=organism takes that model's, WITHIN=3 those of three minutes
# at most, LIST=1 says what would run.
figures: $(VENV)/.installed
	$(BIN)/python -m experiments.figures $(if $(MODEL),--model $(MODEL)) $(if $(WITHIN),--within $(WITHIN)) $(if $(LIST),--list)

# Would a wrong line be noticed? At most 40 minutes on two cores; not a part of CI.
mutants: $(VENV)/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m experiments.mutants

install: $(VENV)/.installed

# torch first and alone, so that no other package's range can bring another build of it.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[gemma,dev]"
	touch $@
