# FlexP from a fresh clone with nothing but Python (3.11 or later), make and a package registry.
#
#   make demo     install what running needs, then run the demonstration
#   make test     install everything, run the tests
#   make soak     the tests that take longest: processes killed at any moment, worker pools, a slow line of the kernel
#   make check    formatting, lint, types
#   make docs     the documentation as a site, in build/site
#   make flower-demo   a run on Flower, stopped and gone on with, in an environment of its own (.venv-flower)
#   make venv     only make the environment (.venv) for development
#   make clean    remove the environment and what tools left behind
#
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Not compiled: most of what comes is never imported, and the rest is compiled when it is first, and kept, whatever the
# environment says of bytecode: each process of the tests would compile torch and transformers anew (11 s).
COMPILED := PYTHONDONTWRITEBYTECODE=
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test soak check format docs flower-demo venv clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,/^Another/p'

demo: $(VENV)/.stamp-run
	$(COMPILED) $(BIN)/flexp demo

test: $(VENV)/.stamp-dev
	$(COMPILED) PYTHONPATH=$(VENV)/quantized OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/quantized
	$(COMPILED) OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

soak: $(VENV)/.stamp-dev
	$(COMPILED) OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m slow

check: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open build/site/index.html (or, to search as well: $(BIN)/python -m http.server --directory build/site)"

flower-demo: $(VENV)-flower/.stamp
	$(VENV)-flower/bin/python examples/flower/demo.py build/flower-demo

venv: $(VENV)/.stamp-dev

clean:
	rm -rf $(VENV) $(VENV)-flower build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make an environment once, and bring it up to date when what it is made of changes.
# Installed in place (-e): changes under src/ need no second installation.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "FlexP needs Python 3.11 or later, and $(PYTHON) is %d.%d: name another one, for instance make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing FlexP and what it needs into $(VENV) (a few minutes the first time) ..."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing FlexP, what it needs and the tools of development into $(VENV) (a few minutes the first time) ..."
	$(INSTALL) -e '.[dev]'
	@# In a place of its own: where it is found, every process that imports peft takes seconds longer.
	$(INSTALL) --no-deps --target $(VENV)/quantized bitsandbytes
	@touch $(VENV)/.stamp-run $@

$(VENV)/.stamp-docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing FlexP and the tools of its documentation into $(VENV) (a few minutes the first time) ..."
	$(INSTALL) -e '.[docs]'
	@touch $(VENV)/.stamp-run $@

# flwr wants other versions of a few packages: those pins go before the others.
$(VENV)-flower/.stamp: pyproject.toml constraints.txt constraints-flower.txt
	@echo "Installing FlexP and Flower into $(VENV)-flower (a few minutes) ..."
	$(PYTHON) -m venv $(VENV)-flower
	sed -n 's/^\([^#].*==\).*/^\1/p' constraints-flower.txt | grep -vif - constraints.txt | cat - constraints-flower.txt > $(VENV)-flower/constraints.txt
	$(VENV)-flower/bin/python -m pip install --disable-pip-version-check --quiet --no-compile -c $(VENV)-flower/constraints.txt -e '.[flower]'
	@# Compiled here, once: else the first run's processes do it, each for itself.
	PYTHONDONTWRITEBYTECODE= $(VENV)-flower/bin/python -c 'import flexp.flower, flexp.run.client, flexp.run.server, flwr.cli.app, flwr.superlink.cli.flower_superlink, flwr.supernode.cli.flower_supernode'
	@touch $@
