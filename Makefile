# make quickstart   the whole recipe on a small model, from a fresh clone
# make test         the tests that two CPU cores run in a few minutes; also test-slow, test-fuzz,
#                   test-chaos, test-slurm, test-gpu
# make lint         ruff and mypy
# make bench        what a GPU's minutes are best spent on, into runs/gpu (BUDGET=480 seconds)
# make rivals      what some benchmarks measure us against, into .rivals (290 MB)
# make tables       the tables of the documents, from benchmarks/results
# make formats    the table of data formats, from what the readers make of each
# make families     every family of Hugging Face's in and out, into benchmarks/results and its table

VENV   ?= .venv
# Python 3.11 or 3.12: the first that is installed and works.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$python && break; done)
# What pip is asked for first. From PyPI this build brings CUDA; for the small CPU build:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
# What of the project to install: .[dev] or .[dev,gpu]
EXTRAS ?= .[dev]
# Options of recipes/quickstart.py, such as ARGS="--data DIR", or of pytest: ARGS=tests/engine/test_rm.py
ARGS   ?=
# Tests that run at once; JOBS=0 runs them in one process, for a debugger
JOBS   ?= $(CORES)

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check
# One thread a physical core: the second hyper-thread of a core only slows a matrix product.
CORES   = $(shell $(BIN)/python -c 'import os, psutil; \
	print(min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0))))')

.PHONY: setup quickstart test test-slow test-fuzz test-chaos test-slurm test-gpu lint bench rivals tables formats families

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one (Debian: apt install" \
		"python3 python3-venv) or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "[1/3] $(VENV): a virtual environment of $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); \
		echo "error: $(PYTHON) cannot make one; Debian: apt install python3-venv" >&2; exit 1; }
	@echo "[2/3] $(TORCH): the largest download"
	@$(PIP) $(TORCH)
	@echo "[3/3] the project and the libraries it stands on"
	@$(PIP) --editable '$(EXTRAS)'
	@touch $@

quickstart: $(STAMP)
	OMP_NUM_THREADS=$(CORES) $(BIN)/python recipes/quickstart.py $(ARGS)

# One thread a process: the tests start several ranks at once. A process begins with a run of files
# of its own, and so makes their fixtures once; who is done early takes tests over from the others.
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
BESIDE  = -n $(JOBS) --dist worksteal
test: $(STAMP)
	$(PYTEST) $(BESIDE) $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) $(BESIDE) -m "slow and not gpu and not slurm and not fuzz and not chaos" $(ARGS)

test-fuzz: $(STAMP)
	$(PYTEST) $(BESIDE) -m fuzz $(ARGS)

test-chaos: $(STAMP)
	$(PYTEST) $(BESIDE) -m chaos $(ARGS)

test-slurm: $(STAMP)
	$(PYTEST) -m slurm

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

BUDGET ?= 480
bench: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --budget $(BUDGET) --out runs/gpu

# Without dependencies: torch and transformers stay those of the project.
rivals: .rivals/.installed

.rivals/.installed: benchmarks/rivals.txt $(STAMP)
	@rm -rf .rivals
	$(PIP) --target .rivals --no-deps --requirement $<
	@touch $@

tables: $(STAMP)
	$(BIN)/python -m benchmarks.tables

formats: $(STAMP)
	$(BIN)/python -m tests.engine.shapes.format_table

# The rows of one whole run: what fails leaves the table as it was.
FAMILIES = benchmarks/results/families.jsonl
families: $(STAMP)
	rm -f $(FAMILIES).new
	$(PYTEST) -m slow tests/engine/huggingface/test_families_around.py --record $(FAMILIES).new
	mv $(FAMILIES).new $(FAMILIES)
	$(BIN)/python -m benchmarks.tables
