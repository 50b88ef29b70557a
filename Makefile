# make demo | test | lint | bench: each makes .venv when it is missing and rebuilds what changed, nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint bench clean

demo: .venv/built
	$(BIN)/vvae-fast compare

test: .venv/built
	$(BIN)/python -m pytest

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/built
	@mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks -o python_files="bench_*.py" -o python_functions="bench_*" \
		--benchmark-disable-gc --benchmark-columns=median,iqr,rounds --benchmark-quiet --benchmark-json=.benchmarks/last.json

clean:
	rm -rf build vvae_fast/*.so vvae_fast.egg-info .venv/built

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first: the extension is built against it.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing PyTorch and the build tools into .venv"
	$(PIP) torch setuptools ninja pybind11
	@touch $@

.venv/built: .venv/installed setup.py $(SOURCES)
	@echo "Building the extension and installing the extras (about a minute)"
	$(PIP) --no-build-isolation --editable '.[train,bench,test]'
	@touch $@
