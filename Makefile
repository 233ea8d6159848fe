# `make demo` and `make test` need only Python >= 3.11 with venv, and gcc.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint fuzz bench clean

demo: $(VENV)/user
	$(BIN)/organfast demo -o demo

# Two processes, a test module to each at a time; JOBS=0 runs all in one.
JOBS ?= 2
test: $(VENV)/dev lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Half a minute to compile the forest's kernel with gcc's sanitizers, then so many seconds.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/dev
	$(BIN)/python tools/sanitize.py fuzz --seconds $(FUZZ_SECONDS)

# About ten minutes; fails where a ratio fell by more than a tenth since the last committed run.
# PEERS=peers,peers-heavy times torch, jax and MONAI as well, some gigabytes to install.
PEERS ?= peers
bench: $(VENV)/dev
	$(BIN)/pip install --quiet --editable '.[$(PEERS)]'
	$(BIN)/python benchmarks/publish.py || fell=1; \
	$(BIN)/python tools/benchmark_table.py && exit $${fell:-0}

clean:
	rm -rf $(VENV) build demo organfast.egg-info organfast/kernels/*.so organfast/kernels/*.c

SOURCES := pyproject.toml setup.py $(wildcard organfast/kernels/*.pyx organfast/kernels/*.h)

$(VENV)/user: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/dev: $(VENV)/user
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
