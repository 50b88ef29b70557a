# make demo | check | test | test-compiled | test-long | sanitize | lint | docs | peers-tests | bench | bench-quick | report | results | sass | wheel:
# each makes .venv when missing and rebuilds what changed only.
# make gpu-test | gpu-bench | gpu-sanitize | gpu-tune: on a GPU with $(PYTHON) as it is, each under 9 minutes; make gpu: all
# of them in turn. RESULTS=folder, COMMIT=what git cannot tell. make gpu-prebuilt: what they would build, built before, on a
# machine with nvcc, for ARCHITECTURES=9.0. See docs/gpu.md.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
SOURCES := $(wildcard csrc/*/*.* csrc/*/*/*.*)

.PHONY: demo check test test-compiled test-long sanitize lint docs peers-tests bench bench-quick report results sass wheel gpu gpu-test gpu-bench gpu-sanitize gpu-tune \
	gpu-prebuilt clean

demo: .venv/built
	$(BIN)/vvae-fast compare

# A process for each core, up to four; a file's tests stay together. WORKERS=0: all in one process.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4
BY_FILE := --dist loadfile --no-loadscope-reorder

# Between two commits.
check: lint
	$(PYTEST) $(BY_FILE) tests/core tests/house

test: .venv/built
	$(PYTEST) $(BY_FILE) --durations 10

# What has the marker long: it compiles for minutes, or varies what make test tries.
test-compiled: .venv/built
	$(PYTEST) $(BY_FILE) --durations 10 -m long

# The same, then the property tests with 2,000 examples each, other ones in every run: SEED=number repeats one.
test-long: SEED := $(or $(SEED),$(shell od -An -N4 -tu4 /dev/urandom | tr -d ' '))
test-long: test-compiled
	@echo "make test-long SEED=$(SEED) draws the same examples again"
	$(PYTEST) --dist load tests/cpu/test_properties*.py --hypothesis-profile=long --hypothesis-seed=$(SEED)

# The C++ kernels and operators under AddressSanitizer with UBSan, and under ThreadSanitizer; see tests/cpu/sanitized.py.
sanitize: .venv/built
	$(BIN)/python tests/cpu/sanitized.py

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/ into build/docs/html: a warning is an error, links within it are checked, and all notebooks are run. NOTEBOOKS=off runs none.
# Links to other sites are not fetched, so that no result depends on a network; LINKCHECK=1 fetches them.
SPHINX := $(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet --fresh-env --jobs auto

docs: .venv/built-docs
	$(SPHINX) -b html $(if $(NOTEBOOKS),-D nb_execution_mode=$(NOTEBOOKS)) docs build/docs/html
	$(if $(LINKCHECK),$(SPHINX) -b linkcheck -D nb_execution_mode=off docs build/docs/linkcheck)
	@echo "The site is in build/docs/html/index.html"

# normflows', pythae's, Pyro's and PyTorch's own tests with this package's classes: PEERS=folders with their checkouts.
peers-tests: .venv/built
	$(BIN)/python -m benchmarks.other_packages.peers_tests $(PEERS)

# On an idle machine. DEVICE=cpu or cuda; by default a GPU where there is one.
BENCH := $(BIN)/python -m pytest benchmarks -q -p no:cacheprovider -o python_files="bench_*.py" -o python_functions="bench_*" \
	--benchmark-disable-gc --benchmark-quiet $(if $(DEVICE),--device=$(DEVICE))

bench: .venv/built
	$(BENCH)

bench-quick: .venv/built
	$(BENCH) --quick

report: .venv/built
	$(BIN)/python -m benchmarks.report.report

# docs/results.md and its figures, from docs/results/ and configs/.
results: .venv/built
	$(BIN)/python -m benchmarks.study.study_report

# What the GPU kernels cost by their machine code, without a GPU; needs nvcc. TABLES=cuda or triton: one of the two.
sass: .venv/built
	$(BIN)/python -m benchmarks.sass.sass_tables $(TABLES)

# A wheel in dist/, checked; TORCH=version: for the fresh environment, by default that of constraints.txt.
wheel: .venv/built
	$(BIN)/python -m build_tools.wheel $(if $(TORCH),--torch "$(TORCH)") $(if $(WHEEL),--wheel "$(WHEEL)")

gpu gpu-test gpu-bench gpu-sanitize gpu-tune:
	@$(PYTHON) -m benchmarks.gpu.gpu $(patsubst gpu-%,%,$(filter-out gpu,$@)) $(if $(RESULTS),--results "$(RESULTS)") $(if $(COMMIT),--commit "$(COMMIT)")

gpu-prebuilt:
	@$(PYTHON) -m benchmarks.gpu.prebuilt $(if $(ARCHITECTURES),--architectures "$(ARCHITECTURES)")

clean:
	rm -rf build vvae_fast/*.so vvae_fast/_built.json vvae_fast.egg-info .venv/built .venv/built-docs

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first: the extension is built against it.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing PyTorch and the build tools into .venv"
	$(PIP) torch setuptools ninja pybind11
	@touch $@

.venv/built: .venv/installed setup.py $(SOURCES)
	@echo "Building the extension and installing the extras (about two minutes)"
	$(PIP) --no-build-isolation --editable '.[train,bench,test]'
	@touch $@

.venv/built-docs: .venv/built
	@echo "Installing what makes the site"
	$(PIP) 'vvae_fast[docs]'  # of what is installed already: nothing is built again
	@touch $@
