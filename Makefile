# make demo            set up .venv, then build shards, pre-train, visualize and report on real photographs
# make demo DATA=DIR   the same with your own folder of images
# make test            set up .venv, then run all tests
# make test-fast       the unit tests that need no root, Slurm, launcher or network
# make soak            the tests that are too long for `make test`
# make bench           the benchmarks that run on this machine; nothing else should run meanwhile
# make gpu-check       verify the GPU path on this machine (docs/gpu.md)
# make lint            ruff, pyright and shellcheck
# make clean           delete the outputs of the demo and of builds

# The first Python that runs (a version manager's shim may not), is 3.11 or 3.12, and has venv.
IS_SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c '$(IS_SUITABLE)' 2>/dev/null && echo $$p && break; done)
# Some tests mount a small disk; without root this needs a user namespace.
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo unshare --map-root-user --mount)
VENV := .venv
BIN := $(VENV)/bin
CUDA ?= cuda13
DATA ?=
OUT ?= out/demo

.PHONY: setup demo test test-fast soak bench gpu-check lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c '$(IS_SUITABLE)' || { echo "error: Python 3.11 or 3.12 with venv is needed;" \
		"install it (Debian: python3-venv), or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "Installing into $(VENV) (about 6 GB, some minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(CUDA),dev]'
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" demo/run.sh "$(OUT)" "$(DATA)"

PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest
# Three files at a time, because some runs wait (for each other, for Slurm, for signals).
IN_PARALLEL := --time -n 3 --dist loadgroup --no-loadscope-reorder

test: setup
	$(AS_ROOT) $(PYTEST) $(IN_PARALLEL) tests

# Left out: tests that need root, a launcher or a server, that start many interpreters, or that take long.
SLOW_FILES := pipeline/test_bench_loader pipeline/test_cache pipeline/test_crop_law pipeline/test_export_classifier \
	pipeline/test_export_command pipeline/test_gpu_check pipeline/test_host_memory pipeline/test_launcher_gone \
	pipeline/test_network_estimate pipeline/test_plan pipeline/test_preflight pipeline/test_report \
	pipeline/test_storage pipeline/test_undecodable \
	data_prep/test_disk_full data_prep/test_interruption data_prep/test_tasks data_prep/test_verify
SLOW_TESTS := static_graph or interrupted_runs or heavy or logs_to_stderr

test-fast: setup
	$(PYTEST) -n 2 --dist loadgroup $(SLOW_FILES:%=--ignore tests/%.py) -k "not ($(SLOW_TESTS))" tests/pipeline tests/data_prep

soak: setup
	$(AS_ROOT) $(PYTEST) $(IN_PARALLEL) -m soak tests

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(CUDA),bench]'
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step_448.py
	$(BIN)/python benchmarks/difficulty.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/mixing.py
	$(BIN)/python benchmarks/plan_epoch.py
	$(BIN)/python benchmarks/methods_cifar.py

gpu-check: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pipeline gpu-check $(if $(DATA),--data "$(DATA)")

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck -x slurm/*.sh slurm/site.env demo/*.sh .ci/run

clean:
	rm -rf out build *.egg-info
