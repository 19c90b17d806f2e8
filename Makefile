# make demo            set everything up, then build shards, pre-train, reconstruct and report on real photographs
# make demo DATA=DIR   the same on your own folder of images
# make test            set everything up, then run the tests
# make soak            the tests that take longer than `make test` may
# make bench           the benchmarks that run on this machine (quiet it first)
# make lint            ruff

PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(shell command -v $(p) 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
CUDA ?= cuda13
DATA ?=
OUT ?= out/demo

.PHONY: setup demo test soak bench lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
		"Python 3.11 or 3.12 is needed, $(PYTHON) is %d.%d; name one: make PYTHON=python3.12" % v)'
	@echo "Installing into $(VENV) (about 6 GB, some minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(CUDA),dev]'
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" demo/run.sh "$(OUT)" "$(DATA)"

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

soak: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m soak

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(CUDA),bench]'
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/methods_cifar.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf out build *.egg-info
