# Two commands do everything on a machine that has Python 3.11+ and make:
#   make demo   sets up .venv, then trains a real network under Elesh
#   make test   sets up .venv, then runs the quick tests in parallel
# `make test-all` runs every test but the soak tests, `make soak` those.
# On Linux without a GPU, see "Installing" in README.md for PyTorch's smaller CPU build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all soak check check-types check-files contracts reference clean

demo: $(READY)
	$(BIN)/elesh demo

# One file's tests stay in one process, and each process computes with one thread; tests/conftest.py
# puts the long ones first, so that no process is left with them at the end.
# Compiled tests and modules are kept: without, every process of a run compiles them anew.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not slow and not soak"

test-all: $(READY)
	$(PYTEST) -m "not soak"

# The drivers are scripts: they find the tests' networks by the path.
soak: export PYTHONPATH := tests/support:tests/support/nets:tests/support/random_networks:tests/support/setups
soak: $(READY)
	$(BIN)/python -m pytest -m soak --timeout 3600
	$(BIN)/python -m tests.chaos --seed 1 --minutes 10
	$(BIN)/python tests/support/kill_driver.py --moments 200 --seed 1
	$(BIN)/python -m tests.fuzz --count 100000 --seed 1
	$(BIN)/python -m tests.random_graphs --count 2000 --seed 1

# `make -j2 check` has both at once.
check: check-types check-files

check-types: $(READY)
	$(BIN)/mypy

check-files: $(READY)
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/ruff format --check .
	$(BIN)/python -m contracts.generate --check
	$(BIN)/python -m docs.generate --check

contracts: $(READY)
	$(BIN)/python -m contracts.generate

reference: $(READY)
	$(BIN)/python -m docs.generate

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Elesh needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
