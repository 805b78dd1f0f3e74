# make demo   environment, conversion of the embedded model, stories from a 2 x 2 mesh of virtual CPU devices
# make test   environment with what the tests need, and the tests (MARKS="not slow" leaves out the slow ones)
# make lint   ruff
# make clean  removes build/ (not the environment)

PYTHON ?= python3
MARKS ?= slow or not slow
BIN := .venv/bin
MODEL := build/tinystories

# XLA's thread pool: with fewer than four threads per virtual device its collectives can deadlock
export NPROC ?= 32
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DELETE_ON_ERROR:
.PHONY: demo test lint clean

demo: .venv/installed $(MODEL)/manifest.json
	@rm -f build/demo.*
	@$(BIN)/python -m jaxinfer.generate --model $(MODEL) --prompts examples/tinystories/prompts.jsonl \
		--output build/demo.jsonl --mesh stage=2,tensor=2 --cpu-devices 4 --dtype float32 \
		--max-new-tokens 150 --max-batch 8 --print

$(MODEL)/manifest.json: $(wildcard examples/tinystories/model/*) | .venv/installed
	@rm -rf $(MODEL)
	@$(BIN)/python -m convert --source examples/tinystories/model --output $(MODEL) --dtype float32

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "$(MARKS)"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
		f"jaxinfer needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ .venv/installed
