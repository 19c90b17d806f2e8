"""What went into which step, for those who doubt.

    samples/rank-R.txt          a line "<step> <sample key>" a sample, steps from 0
    samples/pixels-rank-R.txt   "<step> <sample key> <digest>", of image and noise as the model gets them

Invariant: over all ranks, the lines of a step are the samples of that global step, whatever happened to the
run, and on however many ranks it was continued.
"""

import hashlib
import re
from pathlib import Path

import torch

from pipeline.io.atomic import atomic_write

LINE = re.compile(r"(\d+) .+\n")


def truncate_after(run: Path, step: int) -> None:
    """Remove what any rank wrote from `step` on, also those that are gone; rank 0 calls it, before the others
    open their files."""
    for path in (run / "samples").glob("*rank-*.txt"):
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if (found := LINE.fullmatch(line)) and int(found[1]) < step]
        atomic_write(path, "".join(kept))


class SampleTrace:
    """Appends one rank's samples."""

    def __init__(self, run: Path, rank: int):
        folder = run / "samples"
        folder.mkdir(exist_ok=True)
        self.keys = open(folder / f"rank-{rank}.txt", "a")  # noqa: SIM115 (closed in `close`)
        self.pixels = open(folder / f"pixels-rank-{rank}.txt", "a")  # noqa: SIM115

    def write(self, step: int, keys: list[str], images: torch.Tensor, noise: torch.Tensor) -> None:
        """images: (B, ...), noise: (B, ...), of the samples of those B keys."""
        digests = map(digest, images.cpu(), noise.cpu())
        self.keys.write("".join(f"{step} {key}\n" for key in keys))
        self.pixels.write("".join(f"{step} {key} {of}\n" for key, of in zip(keys, digests, strict=True)))
        self.keys.flush()
        self.pixels.flush()

    def close(self) -> None:
        self.keys.close()
        self.pixels.close()


def digest(*tensors: torch.Tensor) -> str:
    """16 hexadecimal digits of the tensors' values, whatever their layout in memory."""
    blake = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        blake.update(tensor.contiguous().view(torch.uint8).numpy())
    return blake.hexdigest()
