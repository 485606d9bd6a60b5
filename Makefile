# `make demo` and `make test` do all their own set-up: they need Python 3.11 or newer with pip, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-experiments slow fuzz check bench claims compiled docs package clean

demo: $(VENV)/experiments
	$(BIN)/python -m experiments configs/quickstart.toml --replace

# The library and its pages, and of the experiments those tests that train nothing.
QUICK := $(filter-out tests/experiments/ tests/__pycache__/,$(wildcard tests/*/)) tests/experiments/test_configs.py
test: $(VENV)/tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(or $(TESTS),$(QUICK))

test-experiments: $(VENV)/tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" tests/experiments

# Compiled as users do; the quick ones are quicker with little optimization (tests/conftest.py).
slow: $(VENV)/tests
	XLA_FLAGS= $(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow $(TESTS)

# Generated layers against the oracle, from seed START on: ten seeds of each program. It prints where to go on.
fuzz: $(VENV)/tests
	$(BIN)/python tests/fuzz.py $(or $(N),1000) $(or $(START),0)

check: $(VENV)/checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, at the address that it prints; it follows what is edited.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# What would be uploaded to a package index, in dist/.
package: $(VENV)/package
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*

# Beside the libraries that the package is compared with; PyTorch too if it is installed.
bench: $(VENV)/experiments $(VENV)/neighbours
	$(BIN)/python -m experiments.benchmark --replace --readme docs/speed.md

# The report in docs/claims/, whose first page says how many minutes it took; with SMOKE=1 everything as small as it can be, in runs/;
# with CHECK=grid, steps, split or machine the answers again, measured otherwise or on another machine.
claims: $(VENV)/experiments $(VENV)/aeon
	$(BIN)/python -m experiments.claims $(if $(SMOKE),--smoke,--publish) $(CHECK:%=--check %) $(ONLY:%=--only %)

# What XLA's compilers make of the layer for TPUs (0.3 GB to install) and for GPUs (1.5 GB), on a machine that has neither:
# docs/compiled, in an hour; with SMALL=1 what `.ci/run` checks, in minutes. It goes on where it was interrupted.
compiled:
	newer=$$(.ci/newer-python) && for kind in tpu gpu; do \
	    $(MAKE) .venv-$$kind/compiled-$$kind VENV=.venv-$$kind PYTHON=$$newer \
	        || { echo "compiled-$$kind cannot be installed: nothing was measured." >&2; exit 1; }; done
	.venv-tpu/bin/python -m experiments.compiled measure tpu $(if $(SMALL),--small)
	.venv-gpu/bin/python -m experiments.compiled measure gpu $(if $(SMALL),--small)
	.venv-gpu/bin/python -m experiments.compiled report $(if $(SMALL),--small)

# One file for each extra of pyproject.toml that is installed; older than what it was installed from, it is made again.
$(VENV)/%: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

# Of aeon only the data are read: nothing that it depends on is needed.
$(VENV)/aeon: constraints.txt | $(VENV)/experiments
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps aeon
	touch $@

clean:
	rm -rf $(VENV) .jax_cache runs
