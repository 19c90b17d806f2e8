"""samples/rank-R.txt: which sample went into which step, a line "<step> <sample key>" each, steps from 0.

Invariant: over all ranks, the lines of a step are the samples of that global step, whatever happened to the
run.
"""

from pathlib import Path


def take_back(run: Path, step: int) -> None:
    """Remove what any rank wrote from `step` on; rank 0 calls it, before the others open their files."""
    for path in (run / "samples").glob("rank-*.txt"):
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and int(line.split(" ", 1)[0]) < step]
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(kept))
        temporary.replace(path)


class Trace:
    """Appends one rank's samples."""

    def __init__(self, run: Path, rank: int):
        (run / "samples").mkdir(exist_ok=True)
        self.file = open(run / "samples" / f"rank-{rank}.txt", "a")  # noqa: SIM115 (closed in `close`)

    def write(self, step: int, keys: list[str]) -> None:
        self.file.write("".join(f"{step} {key}\n" for key in keys))
        self.file.flush()

    def close(self) -> None:
        self.file.close()
