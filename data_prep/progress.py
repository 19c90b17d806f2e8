"""Progress of a build on stderr: a bar on a terminal, otherwise a log line per minute."""

import logging
import sys
import time

from data_prep.workers import Totals

logger = logging.getLogger(__name__)

_LOG_SECONDS = 60.0


class Progress:
    """Show how many of `total` inputs, None if their number is unknown, were processed in this run."""

    def __init__(self, total: int | None):
        self._total = total
        self._sums = [0, 0, 0, 0, 0]
        self._start = self._last_log = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=" images", dynamic_ncols=True, smoothing=0.1)

    def update(self, totals: Totals) -> None:
        """Add what the workers have processed since the last call."""
        for i, count in enumerate(totals):
            self._sums[i] += count
        if self._bar is not None:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update(totals[0])
        elif time.monotonic() - self._last_log >= _LOG_SECONDS:
            self._last_log = time.monotonic()
            self._log()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._sums[0]:
            self._log()

    def _log(self) -> None:
        done = self._sums[0]
        rate = done / max(time.monotonic() - self._start, 1e-9)
        if self._total is None:
            logger.info(f"{done:,} images, {rate:,.0f} images/s, {self._counts()}")
            return
        minutes, seconds = divmod(round((self._total - done) / max(rate, 1e-9)), 60)
        remaining = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        logger.info(f"{done:,} of {self._total:,} images, {rate:,.0f} images/s, {self._counts()}, ETA {remaining}")

    def _counts(self) -> str:
        _, read, _, repaired, quarantined = self._sums
        megabytes = read / 1e6 / max(time.monotonic() - self._start, 1e-9)
        return f"{megabytes:,.0f} MB/s, {repaired:,} repaired, {quarantined:,} quarantined"
