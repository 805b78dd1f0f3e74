# make demo   environment, conversion of the embedded model, stories from a 2 x 2 mesh of virtual CPU devices
# make test   environment with what the tests need, and the tests, but for the long ones
# make check  the fast half of them, in under 3 minutes on two cores
# make test-long   studies, soaks, load, commands of the docs
# make bench  the benchmarks in their CPU size, on a model of toy shape; figures and a picture in build/bench
# make study  a study of the embedded model on virtual CPU devices: tables and figures in build/study; run again, it goes on
# make lint   ruff
# make clean  removes build/ (not the environment)

PYTHON ?= python3
BIN := .venv/bin
MODEL := build/tinystories
STUDY := build/study
TOY := --model tiny --cpu-devices 1

# XLA's thread pool: with fewer than four threads per virtual device its collectives can deadlock
export NPROC ?= 32
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DELETE_ON_ERROR:
.PHONY: demo test check test-long bench study lint clean

demo: .venv/installed $(MODEL)/manifest.json
	@rm -f build/demo.*
	@$(BIN)/python -m jaxinfer.generate --model $(MODEL) --prompts examples/tinystories/prompts.jsonl \
		--output build/demo.jsonl --mesh stage=2,tensor=2 --cpu-devices 4 --dtype float32 \
		--max-new-tokens 150 --max-batch 8 --print

# convert/__init__.py holds the version of what is written
$(MODEL)/manifest.json: $(wildcard examples/tinystories/model/*) convert/__init__.py | .venv/installed
	@rm -rf $(MODEL)
	@$(BIN)/python -m convert --source examples/tinystories/model --output $(MODEL) --dtype float32

test: MARKS := not long
check: MARKS := not long and not slow and not slurm
test-long: MARKS := long
test check test-long: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "$(MARKS)"

bench: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/build/compiled
bench: .venv/installed-dev
	$(BIN)/python -m benchmarks.latency $(TOY) --batch 1,4 --prompt-tokens 64 --new-tokens 32 --peer \
		--json build/bench/latency.json
	$(BIN)/python -m benchmarks.throughput $(TOY) --requests 32 --prompt-range 16:64 --new-tokens 16 --max-batch 8 \
		--peer --json build/bench/throughput.json
	$(BIN)/python -m benchmarks.prefill $(TOY) --prompts 8 --prompt-tokens 64 --json build/bench/prefill.json
	$(BIN)/python -m benchmarks.long_context $(TOY) --batch 2 --context 512 --new-tokens 64 \
		--json build/bench/long_context.json
	$(BIN)/python -m benchmarks.startup $(TOY) --prompt-tokens 32 --json build/bench/startup.json
	$(BIN)/python -m benchmarks.collectives --cpu-devices 4 --sizes 8K,128K,1M --chain 8 \
		--json build/bench/collectives.json
	$(BIN)/python -m benchmarks.draw build/bench/*.json --output build/bench/bench.png

study: .venv/installed-plot $(MODEL)/manifest.json
	$(BIN)/python -m jaxinfer.study run configs/studies/laptop.yaml --output $(STUDY)
	$(BIN)/python -m jaxinfer.study tables $(STUDY)
	$(BIN)/python -m jaxinfer.study figures $(STUDY)

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

.venv/installed-plot: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plot]'
	@touch $@ .venv/installed

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ .venv/installed .venv/installed-plot
