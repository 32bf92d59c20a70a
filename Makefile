# `make help` lists the targets. Everything is installed into $(VENV) by the pins of constraints.txt;
# the stamps in it make every later run quick.

.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
VERSIONS := 3.11 3.12 3.13
EXTRAS := redis,cli,metrics,examples
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALL := $(PIP) --build-constraint constraints.txt

# The first interpreter of VERSIONS that really runs and can make an environment: a pyenv shim may be on
# PATH and fail, and Debian ships Python without venv.
USABLE := import sys, venv, ensurepip; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])
FIND_PYTHON = for python in $(foreach v,$(VERSIONS),python$(v) $(wildcard $(PYENV_ROOT)/versions/$(v)*/bin/python)) \
	python3 python; do \
	if "$$python" -c '$(USABLE)' $(VERSIONS) >/dev/null 2>&1; then command -v "$$python"; exit; fi; done
PYTHON ?= $(shell $(FIND_PYTHON))

.PHONY: help demo test pytest layers lint format bench constraints clean which-python

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-13s%s\n", $$1, $$2}' '$(strip $(MAKEFILE_LIST))'

demo: $(VENV)/.demo  ## run the main job: 90 HTTP calls, four ways
	$(BIN)/python examples/forex.py

test: lint layers $(VENV)/.test  ## all checks: lint, types, layers, tests, branch coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

pytest: $(VENV)/.test  ## the tests alone; other interpreters: make pytest VENV=.venv-3.12 VERSIONS=3.12
	$(BIN)/python -m pytest

layers: $(VENV)/.test  ## no import of the package points up or sideways
	$(BIN)/python -m pytest --quiet tests/test_layers.py

lint: $(VENV)/.lint  ## ruff, mypy and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

format: $(VENV)/.lint  ## let ruff repair and format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.test  ## run a benchmark: make bench NAME=delegation; without NAME, list them
	$(BIN)/python -m benchmarks $(NAME)

constraints: $(VENV)/.pip  ## remake constraints.txt with the newest versions that pyproject.toml admits
	$(INSTALL) --group tools
	{ echo '# Exact versions of everything that pyproject.toml names, for every Python it admits.'; \
	  echo '# Remade by `make constraints`; not edited by hand.'; \
	  $(BIN)/uv pip compile pyproject.toml --quiet --universal --all-extras --group dev --no-annotate --no-header; \
	} > constraints.new
	mv constraints.new constraints.txt

clean:  ## remove the environments and everything that the tools leave
	rm -rf .venv .venv-* .coverage .coverage.* htmlcov build dist mutants .mutmut-cache constraints.new
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

which-python:  # the interpreter that a new environment would be made with
	@test -n '$(PYTHON)' && echo '$(PYTHON)'

$(BIN)/python:
	@if ! '$(PYTHON)' -c '$(USABLE)' $(VERSIONS) >/dev/null 2>&1; then \
		echo 'No usable Python $(VERSIONS) (with its venv module) $(if $(PYTHON),in $(PYTHON),on PATH).' >&2; \
		echo 'Install one (on Debian with its python3-venv), or name it: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.11' >&2; \
		exit 1; fi
	'$(PYTHON)' -m venv $(VENV)

$(VENV)/.pip: constraints.txt | $(BIN)/python
	$(PIP) --upgrade 'pip>=25.3'
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.pip
	$(INSTALL) --editable '.[examples]'
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.pip
	$(INSTALL) --editable '.[$(EXTRAS)]' --group test --group bench
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) --group lint
	touch $@
