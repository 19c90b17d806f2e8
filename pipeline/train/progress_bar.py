"""Progress of a run: a progress bar on a terminal, a log line every few seconds elsewhere."""

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)
INTERVAL_S = 10.0
"""Seconds between two log lines."""
STRAGGLER_FACTOR = 1.25
"""A rank that takes this multiple of the median time per step is named."""


class ProgressBar:
    """Shows completed steps, loss, throughput, data wait and ETA."""

    def __init__(self, step: int, total_steps: int):
        self.first_step, self.total_steps = step, total_steps
        self._started, self._logged = time.monotonic(), 0.0
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, line: dict) -> None:
        """Show the metrics of a logged step."""
        loss = "every step skipped" if line["loss"] is None else f"loss {line['loss']:.4f}"
        text = f"{loss}, {line['images_per_s']:.0f} images/s, data wait {line['data_wait']:.1%}"
        if line["slowest_time"] > STRAGGLER_FACTOR * line["rank_time"]:
            text += (
                f", slowest is rank {line['slowest_rank']} on {line['slowest_host']} "
                f"({line['slowest_time'] / line['rank_time']:.1f} x the median)"
            )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        now, step = time.monotonic(), line["step"]
        if now - self._logged >= INTERVAL_S or step == self.total_steps:
            self._logged = now
            remaining = (now - self._started) / max(step - self.first_step, 1) * (self.total_steps - step)
            logger.info(f"step {step}/{self.total_steps}: {text}, ETA {tqdm.format_interval(remaining)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
