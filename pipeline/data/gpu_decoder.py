"""Checks of a GPU's JPEG decoder: the version of nvJPEG, and region (ROI) decoding in a child process.

    python -m pipeline.data.gpu_decoder DEVICE < boxes      boxes: pickled arguments of `check_roi_decoding`

nvImageCodec 0.9 is reported to fail on A100 and to crash with a segmentation fault on H100 and B200 when it decodes
regions (https://github.com/NVIDIA/nvImageCodec/issues/55), so this is tried where a crash ends only a child.
"""

import ctypes
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.data.dali import Inputs, decode_boxes, error_reason
from pipeline.data.decode_options import DecodeOptions
from pipeline.errors import UserError

MAX_MEAN_DIFFERENCE = 2.0
"""Levels, of an image's pixels: JPEG decoders differ by less than one."""
TIMEOUT_S = 300.0


def nvjpeg_version() -> str | None:
    """Return the version of the nvJPEG library that this process has loaded, None if it has loaded none."""
    paths = re.findall(r"\S*/libnvjpeg\.so\S*", Path("/proc/self/maps").read_text())
    if not paths:
        return None
    library, number = ctypes.CDLL(paths[0]), ctypes.c_int()
    numbers = []
    for field in range(3):  # libraryPropertyType: major, minor, patch
        library.nvjpegGetProperty(field, ctypes.byref(number))
        numbers.append(str(number.value))
    return ".".join(numbers)


def probe_roi_decoding(inputs: Inputs, device: torch.device) -> None:
    """Decode regions on a device in a child process.

    Args:
        inputs: The first three inputs of `training_pipeline_def`.

    Raises:
        UserError: If the child fails or crashes, or the pixels are not the CPU's.
    """
    run_child([sys.executable, "-m", __name__, str(device)], pickle.dumps(inputs), f"decoding regions on {device}")


def run_child(command: Sequence[str], stdin: bytes, what: str) -> None:
    """Run a command that checks ROI decoding. Raise UserError with its last line, or its signal, if it fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        problem = f"took more than {TIMEOUT_S:.0f} s"
        raise UserError(f"data.roi_decode: {what} {problem}; --set data.roi_decode=false") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        problem = f"died by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"failed: {lines[-1]}"
        raise UserError(f"data.roi_decode: {what} {problem}; --set data.roi_decode=false")


def check_roi_decoding(inputs: Inputs, device: torch.device) -> str:
    """Compare regions that a device decodes with those of the CPU.

    Returns:
        What is wrong, empty if nothing is.
    """
    backend = "mixed" if device.type == "cuda" else "cpu"
    try:
        ours = decode_boxes(inputs, DecodeOptions(backend, roi=True), device)
    except RuntimeError as error:
        return error_reason(error)
    expected = decode_boxes(inputs, DecodeOptions("cpu", roi=False), torch.device("cpu"))
    difference = max(map(mean_difference, ours, expected))
    if difference > MAX_MEAN_DIFFERENCE:
        return f"pixels differ from the CPU's by {difference:.1f} of 255 levels on average"
    return ""


def mean_difference(image: np.ndarray, other: np.ndarray) -> float:
    """Return the mean absolute difference of two images in levels, infinite if their shapes differ."""
    if image.shape != other.shape:
        return float("inf")
    return float(np.abs(image.astype(np.float32) - other).mean())


if __name__ == "__main__":
    sys.exit(check_roi_decoding(pickle.load(sys.stdin.buffer), torch.device(sys.argv[1])) or 0)
