# Every target sets itself up: python3, pip and make are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
PACKER_VENV := .venv-thinker
PACKER_STAMP := $(PACKER_VENV)/.installed
PYTESTARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all soak test-matrix test-thinker thinker-env lint bench accuracy docs clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "constraints.txt needs Python 3.11 or newer; name one with make PYTHON=python3.12")'
	@# Some distributions ship venv without ensurepip; then the pip at hand installs one.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear $(VENV) 2>/dev/null \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
	       && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[test,examples]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(STAMP) ## Train, quantize and export a digit classifier
	$(BIN)/python examples/digits.py

# One thread per worker, and none of them spinning while it waits.
test: $(STAMP) ## Run the tests in parallel
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 \
	  $(BIN)/python -m pytest -n 2 --dist worksteal \
	    --ignore=tests/thinker -m "not slow" $(PYTESTARGS)

test-all: $(STAMP) ## Run the slow tests too (every form of every op), with coverage
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 \
	  $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term \
	    --ignore=tests/thinker $(PYTESTARGS)

soak: $(STAMP) ## Kill thirty runs at random moments and resume them
	@folder=$$(mktemp -d) && PYTHONPATH=. OMP_NUM_THREADS=1 \
	  $(BIN)/python -W ignore -m tests.callbacks.killed_runs $$folder --tries 30; \
	  code=$$?; rm -rf $$folder; exit $$code

# The lowest versions in pyproject.toml, and the newest on the registry, each in its environment.
MATRIX_TESTS ?= tests/callbacks tests/core tests/stages tests/export
test-matrix: $(STAMP) ## Run tests with the lowest supported and the newest versions
	@for versions in lowest newest; do \
	  place=.venv-$$versions; constraints=; \
	  test $$versions = lowest && constraints="-c constraints-lowest.txt"; \
	  echo "== $$versions"; \
	  { $(PYTHON) -m venv --clear $$place 2>/dev/null \
	    || $(PYTHON) -m venv --clear --without-pip $$place; } \
	  && $(PIP) --python $$place/bin/python install -q $$constraints torch \
	  && $(PIP) --python $$place/bin/python install -q $$constraints -e '.[test,examples]' \
	  && OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $$place/bin/python -m pytest -n 2 \
	    --dist worksteal -m "not slow" $(MATRIX_TESTS) $(PYTESTARGS) || exit 1; \
	done

$(PACKER_STAMP): constraints-thinker.txt
	@for python in $(PACKER_PYTHON) $(PYTHON) python3.11 python3.10; do \
	  $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' \
	    2>/dev/null && found=$$python && break; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "the packer needs Python 3.10 or 3.11; name one with make PACKER_PYTHON=..."; exit 1; \
	fi; \
	$$found -m venv --clear $(PACKER_VENV) 2>/dev/null \
	  || { $$found -m venv --clear --without-pip $(PACKER_VENV) \
	       && $$found -m pip --python $(PACKER_VENV)/bin/python install pip; }
	$(PACKER_VENV)/bin/python -m pip --disable-pip-version-check --retries 1 --timeout 15 \
	  install --no-deps -r constraints-thinker.txt
	@touch $@

thinker-env: $(PACKER_STAMP) ## Install thinker's packer into an environment of its own

# Without the packer (no network, no such Python) the tests skip, and say why.
test-thinker: $(STAMP) ## Pack exported models for every chip
	@$(MAKE) --no-print-directory thinker-env || echo "there is no packer: its tests skip"
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 \
	  $(BIN)/python -m pytest -n 2 --dist worksteal tests/thinker $(PYTESTARGS)

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict lightning_linger

bench: $(STAMP) ## Measure what quantization-aware training costs, as ratios
	$(BIN)/python -m benchmarks

# What was run before is kept: an interrupted run goes on, and only changed recipes run again.
accuracy: $(STAMP) ## Measure what quantization costs in accuracy, over five seeds
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.accuracy

docs: $(DOCS_STAMP) ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## Remove the environment and everything built
	rm -rf $(VENV) $(PACKER_VENV) .venv-lowest .venv-newest build dist site htmlcov .coverage .coverage.* .pytest_cache .mypy_cache \
	  .ruff_cache .hypothesis lightning_logs
	find lightning_linger tests benchmarks examples -name __pycache__ -type d -prune \
	  -exec rm -rf {} + 2>/dev/null || true
