# Two commands do everything on a machine that has Python 3.11+ and make:
#   make demo   sets up .venv, then trains a real network under Elesh
#   make test   sets up .venv, then runs every test
# On Linux without a GPU, see "Installing" in README.md for PyTorch's smaller CPU build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check contracts reference clean

demo: $(READY)
	$(BIN)/elesh demo

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy -m contracts.generate -m docs.generate
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
