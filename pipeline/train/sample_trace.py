"""Trace of the samples of every step (data.trace), to verify what was trained.

    samples/rank-R.txt          "<step> <sample key>" per sample; steps count from 0
    samples/pixels-rank-R.txt   "<step> <sample key> <digest>" of image and noise as the model receives them

Invariant: over all ranks, the lines of a step are the samples of that global step, after any interruption and on
any sequence of world sizes.
"""

import hashlib
import re

import torch

from pipeline.io.atomic import atomic_write
from pipeline.train.run_directory import RunDirectory

LINE = re.compile(r"(\d+) .+\n")


def truncate_after(run: RunDirectory, step: int) -> None:
    """Remove the lines of all ranks from `step` on. Rank 0 calls it before the ranks open their files."""
    for path in run.samples.glob("*rank-*.txt"):
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if (match := LINE.fullmatch(line)) and int(match[1]) < step]
        atomic_write(path, "".join(kept))


class SampleTrace:
    """Appends the samples of one rank."""

    def __init__(self, run: RunDirectory, rank: int):
        run.samples.mkdir(exist_ok=True)
        self._keys = open(run.samples / f"rank-{rank}.txt", "a")  # noqa: SIM115 (closed in `close`)
        self._pixels = open(run.samples / f"pixels-rank-{rank}.txt", "a")  # noqa: SIM115

    def write(self, step: int, keys: list[str], images: torch.Tensor, noise: torch.Tensor) -> None:
        """Append a micro batch: B keys, images (B, ...) and noise (B, ...)."""
        digests = map(digest, images.cpu(), noise.cpu())
        self._keys.write("".join(f"{step} {key}\n" for key in keys))
        self._pixels.write("".join(f"{step} {key} {value}\n" for key, value in zip(keys, digests, strict=True)))
        self._keys.flush()
        self._pixels.flush()

    def close(self) -> None:
        self._keys.close()
        self._pixels.close()


def digest(*tensors: torch.Tensor) -> str:
    """Return 16 hexadecimal digits of the tensors' values, independent of their memory layout."""
    blake = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        blake.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return blake.hexdigest()
