"""How far a build is: a bar on a terminal, a line a minute elsewhere.

Invariant: it only shows. Nothing that is written to the set depends on it.
"""

import sys
import time

from data_prep.workers import Totals

_LINE_SECONDS = 60.0


class Progress:
    """total: inputs that are to be looked at in this run."""

    def __init__(self, total: int):
        self._total = total
        self._sums = [0, 0, 0, 0, 0]
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=" images", dynamic_ncols=True, smoothing=0.1)

    def update(self, totals: Totals) -> None:
        for i, count in enumerate(totals):
            self._sums[i] += count
        if self._bar is not None:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update(totals[0])
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._line()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._sums[0]:
            self._line()

    def _line(self) -> None:
        done, seconds = self._sums[0], time.monotonic() - self._start
        rate = done / max(seconds, 1e-9)
        left = (self._total - done) / max(rate, 1e-9)
        print(
            f"{done:,} of {self._total:,} images, {rate:,.0f} images/s, {self._counts()}, ETA {_clock(left)}",
            file=sys.stderr,
            flush=True,
        )

    def _counts(self) -> str:
        _, read, _, repaired, quarantined = self._sums
        megabytes = read / 1e6 / max(time.monotonic() - self._start, 1e-9)
        return f"{megabytes:,.0f} MB/s, {repaired:,} repaired, {quarantined:,} quarantined"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
