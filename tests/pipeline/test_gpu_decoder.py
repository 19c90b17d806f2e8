"""Checks of the GPU's decoder, as far as they run without a GPU."""

import ctypes
import importlib.metadata
import itertools
import pickle
import sys

import numpy as np
import pytest
import torch

from pipeline.data.gpu_decoder import check_roi_decoding, mean_difference, nvjpeg_version, probe_roi_decoding, run_child
from pipeline.data.pixels import known_good_jpeg
from pipeline.data.timing import time_steps
from pipeline.errors import UserError

CPU = torch.device("cpu")
BOXES = [known_good_jpeg()] * 2, np.array([[3, 5], [0, 0]], np.int32), np.array([[20, 30], [64, 48]], np.int32)


def test_regions_are_compared_with_the_cpus():
    assert check_roi_decoding(BOXES, CPU) == ""
    truncated = [known_good_jpeg()[:200]] * 2, *BOXES[1:]
    assert check_roi_decoding(truncated, CPU).startswith("DALI: ")
    image = np.zeros((4, 4, 3), np.uint8)
    assert mean_difference(image, image + 3) == 3 and mean_difference(image, image[:2]) == float("inf")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died by SIGSEGV"),
        ("import sys; print('first', file=sys.stderr); sys.exit('the reason')", "failed: the reason"),
        ("import sys; sys.exit(3)", "failed: exit code 3"),
    ],
)
def test_child_that_fails_is_one_line_with_the_key(code, expected):
    with pytest.raises(UserError, match=f"^data.roi_decode: decoding {expected}; --set data.roi_decode=false$"):
        run_child([sys.executable, "-S", "-c", code], b"", "decoding")


def test_child_that_succeeds_gets_the_input():
    code = "import pickle, sys; sys.exit(pickle.load(sys.stdin.buffer) != [1, 2])"
    run_child([sys.executable, "-S", "-c", code], pickle.dumps([1, 2]), "decoding")


@pytest.mark.soak
def test_probe_decodes_in_a_child():
    probe_roi_decoding(BOXES, CPU)
    with pytest.raises(UserError, match=r"data\.roi_decode: decoding regions on cpu failed: DALI"):
        probe_roi_decoding(([known_good_jpeg()[:200]] * 2, *BOXES[1:]), CPU)


def test_version_of_nvjpeg_is_that_of_the_loaded_library():
    names = ("nvidia-nvjpeg", "nvidia-nvjpeg-cu12")
    installed = [each for each in importlib.metadata.distributions() if each.metadata["Name"] in names]
    assert installed, "DALI's extras install nvJPEG"
    (library,) = (path for path in installed[0].files or () if path.name.startswith("libnvjpeg.so"))
    ctypes.CDLL(str(library.locate()))
    version = nvjpeg_version()
    assert version and installed[0].version.startswith(f"{version}.")


def test_prefetched_batches_do_not_count_as_throughput():
    """Four batches are ready at once; each further one takes a second."""
    now, delivered = [0.0], itertools.count()

    def step():
        now[0] += next(delivered) >= 4

    for warmup, expected in ((5, 10.0), (1, 7.0)):
        delivered = itertools.count()
        timing = time_steps(step, CPU, warmup=warmup, min_steps=10, clock=lambda: now[0])
        assert (timing.steps, timing.seconds) == (10, expected)
    timing = time_steps(step, CPU, warmup=0, min_steps=1, min_seconds=3.5, clock=lambda: now[0])
    assert timing.steps == 4
