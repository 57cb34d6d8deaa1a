# Every target sets up .venv first if it has to; the second time that is instant.
#
#   make demo                                                     remove LayerNorm from the embedded model (minutes)
#   make test                                                     everything that CI checks
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu   take PyTorch from another index

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
STAMP := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH_INDEX ?=

# The first interpreter that is new enough, runs (a pyenv shim may exist and fail) and can make environments.
FIND_PYTHON = for name in python3.11 python3.12 python3.13 python3; do for path in $$(type -aP $$name); do \
	$$path -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$path; exit; }; \
	done; done

.PHONY: help setup demo test test-fast lint format notebook clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP) ## Create .venv and install what constraints.txt pins

$(STAMP): pyproject.toml setup.py constraints.txt
	@python="$$($(FIND_PYTHON))"; \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or newer with the venv module was not found; install it (Debian: apt install python3-venv)"; exit 1; \
	fi; \
	if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
		echo "Setting up .venv with $$python (once; a few minutes)"; $$python -m venv --clear .venv; \
	else \
		echo "Bringing .venv up to date"; \
	fi
	@$(PIP) install setuptools -c constraints.txt
	@$(PIP) install torch -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(PIP) install --no-build-isolation -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## Remove LayerNorm from the embedded model into checkpoints/demo, with a control
	@rm -rf checkpoints/demo
	$(BIN)/ln-remove --model tiny --control --out checkpoints/demo

test: lint ## Lint, types, all tests (slow ones too) and the notebooks
	OMP_NUM_THREADS=1 $(BIN)/pytest -m '' -n 2 --dist loadfile --no-loadscope-reorder --nbmake --nbmake-timeout=900 notebooks tests

test-fast: $(STAMP) ## Only the quick tests
	$(BIN)/pytest

lint: $(STAMP) ## ruff, mypy and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Rewrite the code as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebook: $(STAMP) ## Run the notebooks from start to end (on checkpoints/demo if it is there)
	$(BIN)/pytest --nbmake --nbmake-timeout=900 notebooks

clean: ## Delete caches, builds and the demo; keep .venv and other runs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis checkpoints/demo
	find ln_removal tests -name __pycache__ -type d -prune -exec rm -rf {} +
