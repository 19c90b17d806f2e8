# make demo            set everything up, then build shards, pre-train, reconstruct and report on real photographs
# make demo DATA=DIR   the same on your own folder of images
# make test            set everything up, then run the tests
# make soak            the tests that take longer than `make test` may
# make bench           the benchmarks that run on this machine (quiet it first)
# make lint            ruff

# The first Python that runs (a version manager's shim may not), has the right version and can make a venv.
FITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
# Some tests mount a small disk of their own; without root that takes a user namespace.
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo unshare --map-root-user --mount)
VENV := .venv
BIN := $(VENV)/bin
CUDA ?= cuda13
DATA ?=
OUT ?= out/demo

.PHONY: setup demo test soak bench lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c '$(FITS)' || { echo "error: Python 3.11 or 3.12 with venv is needed;" \
		"install it (Debian: python3-venv), or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "Installing into $(VENV) (about 6 GB, some minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(CUDA),dev]'
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" demo/run.sh "$(OUT)" "$(DATA)"

# Four files at a time, for real runs wait half of the time: for each other, for a signal or for Slurm.
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" $(AS_ROOT) $(BIN)/python -m pytest --time \
	-n 4 --dist loadgroup --no-loadscope-reorder

test: setup
	$(PYTEST) tests

soak: setup
	$(PYTEST) -m soak tests

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(CUDA),bench]'
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/difficulty.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/mixing.py
	$(BIN)/python benchmarks/plan_epoch.py
	$(BIN)/python benchmarks/methods_cifar.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf out build *.egg-info
