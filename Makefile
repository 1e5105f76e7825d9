# Kedge. `make setup` once, then `make test`, `make demo`. Another environment: `make check BIN=/path/to/venv/bin`.

VENV   ?= .venv
PYTHON ?= python3
BIN    ?= $(VENV)/bin
STAMP  := $(VENV)/.kedge-setup

# Whoever names an environment of their own has set it up; otherwise every target sees to .venv first.
ifeq ($(BIN),$(VENV)/bin)
SETUP := $(STAMP)
endif

# One thread: processes outnumber cores here, and two threads a process are 25 times slower than one.
# No test may reach for a model hub. The two paths make the packages importable without an installation.
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
IMPORT  := PYTHONPATH=$(CURDIR):$(CURDIR)/proto

.DEFAULT_GOAL := help
.PHONY: help setup test test-faults check demo bench bench-codec bench-links bench-wire bench-anchor decoupling tiny-model wide-model knobs stubs format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(STAMP)  ## .venv with everything, pinned by constraints.txt (about 2 min, 1.8 GB)
	@echo "ready: $(BIN)"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "Kedge needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make setup PYTHON=python3.11" % v[:2])'
	@echo "setup 1/2: a virtual environment in $(VENV), with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup 2/2: installing kedge and its dependencies as pinned in constraints.txt (about 90 s)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(VENV)/bin/python -m pip check
	@touch $(STAMP)

# Two at a time: half of the time is one process computing. Each takes a share in the order of files, and then the
# other's rest, so that what a module's tests share is made once or twice. ARGS="-n 0" for one after the other.
test: $(SETUP)  ## all tests, offline, two at a time, on one thread a process
	$(OFFLINE) $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10 $(ARGS)

# The second command: processes that are new interpreters, where `make test` forks them (warm_programs.py).
test-faults: $(SETUP)  ## the long forms: 100,000 hostile frames, 2000 bad days of a simulated swarm, 100 kills (20 to 25 min)
	KEDGE_FRAMES=100000 KEDGE_SEEDS=2000 KEDGE_FULL=1 KEDGE_KILLS=100 $(OFFLINE) $(BIN)/python -m pytest -q -s \
	  -o faulthandler_timeout=3600 tests/faults tests/simulation $(ARGS)
	KEDGE_COLD=1 $(OFFLINE) $(BIN)/python -m pytest -q tests/integration/test_programs.py \
	  tests/integration/test_anchor_away.py tests/faults/test_killed_processes.py $(ARGS)

check: $(SETUP)  ## style, types, rooms, README tree, stubs, knob table
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(IMPORT) $(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python tools/check_tree.py
	$(BIN)/python tools/check_stubs.py
	$(BIN)/python tools/check_knobs.py

demo: $(SETUP)  ## three stages, anchor and sampler on this machine learn to add
	$(OFFLINE) $(BIN)/swarm_worker local --config examples/tiny/run.toml --stages 3 --out runs/demo --fresh

bench: $(SETUP)  ## tokens/s of two stages against torch.distributed.pipelining (5 min)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.bench $(ARGS)

bench-codec: $(SETUP)  ## time of encode and decode, and what the links' knobs do to training (5 seeds a cell: hours)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.codec_cost --record
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.codec run --model tiny --workers 2 $(ARGS)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.codec run --model wide --workers 2 $(ARGS)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.codec table

bench-links: $(SETUP)  ## packet streams against raw sockets, on loopback and on an emulated WAN (root, 10 min)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.links $(ARGS)

bench-wire: $(SETUP)  ## the ledger's wire column against the kernel's counters (root; 7 min with ARGS=--demo)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.wire $(ARGS)

bench-anchor: $(SETUP)  ## tokens/s with corrections on and off, taking turns (6 min)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.bench_anchor $(ARGS)

decoupling: $(SETUP)  ## what old corrections and rare refreshes do to training: latency and cadence apart (5 seeds: an hour)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.decoupling run --workers 2 $(ARGS)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m experiments.decoupling table --record

tiny-model: $(SETUP)  ## rebuild examples/tiny/model and its data from seeds
	$(OFFLINE) $(BIN)/python examples/tiny/build.py

wide-model: $(SETUP)  ## runs/wide: the same task at width 512, for `make bench-codec` (10 min)
	$(OFFLINE) $(IMPORT) $(BIN)/python -m examples.wide.build

knobs: $(SETUP)  ## rewrite docs/knobs.md
	$(BIN)/python tools/check_knobs.py --write

stubs: $(SETUP)  ## rewrite the generated files in proto/
	$(BIN)/python tools/make_stubs.py

format: $(SETUP)  ## let ruff put imports and layout right
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

clean:  ## remove caches, build leftovers and runs/demo; .venv and other runs stay
	rm -rf build dist *.egg-info runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -type d -prune -exec rm -rf {} +
