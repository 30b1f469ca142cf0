# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all coverage check docs clean

demo: $(VENV)/installed  ## the main job on a tiny trained model: no download, no GPU, minutes
	$(BIN)/inlaid demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/installed-dev lint  ## lint, types, import contracts, tests: what CI runs, minutes on two cores
	$(MAKE) --no-print-directory -j 2 types fast

.PHONY: fast lint types
fast: $(VENV)/installed-dev  ## failed tests run again, with the values of what they assert
	$(PYTEST) -m "not slow" --assert=plain || \
		{ $(PYTEST) -m "not slow" --last-failed --last-failed-no-failures none; exit 1; }

test-all: $(VENV)/installed-dev check  ## also the tests marked slow, and those of deepspeed where it is installed
	$(PYTEST)

coverage: $(VENV)/installed-dev  ## of the tests that `make test` runs: at least 90 %
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 --dist worksteal -m "not slow"
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --fail-under=90

check: lint types  ## what a commit must pass: a minute

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check src tests benchmarks docs tools
	$(BIN)/ruff check src tests benchmarks docs tools
	$(BIN)/lint-imports
	$(BIN)/codespell src tests docs recipes benchmarks tools README.md CONTRIBUTING.md CHANGELOG.md

types: $(VENV)/installed-dev
	$(BIN)/pyright

docs: $(VENV)/installed-dev  ## regenerate the reference pages, the estimates and the picture of the imports
	$(BIN)/python docs/make.py
	$(BIN)/python docs/costs.py
	$(BIN)/python docs/imports.py

# torch is pinned for development only: elsewhere pip would fetch gigabytes of CUDA.
# Bytecode is compiled at the first import: pip compiles all of torch and transformers, for a minute.
INSTALL = test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/pip install -q --no-compile -c constraints.txt

$(VENV)/installed: pyproject.toml constraints.txt
	$(INSTALL) -e '.[mesh]'
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) runs .work build dist
