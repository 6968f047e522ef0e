# Everything a newcomer needs: `make demo` and `make test` do their own set-up in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help install demo test lint bench vision-table clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## make a virtual environment with pinned versions in .venv

demo: install  ## train a small GPT on English text and grow it while it learns (about 2 minutes)
	$(BIN)/python -m examples.gpt.train --out out/demo --overwrite

test: install  ## run the tests
	$(BIN)/python -m pytest -n 2

lint: install  ## ruff, and mypy on an installed, non-editable copy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	bash .ci/typecheck $(BIN)/python

vision-table:  ## torchvision's and timm's rows of docs/growability.md, in an environment of their own (.venv-vision)
	PYTHON=$(PYTHON) bash benchmarks/vision-env.sh

clean:  ## remove the environment and outputs
	rm -rf $(VENV) .venv-vision out build *.egg-info
