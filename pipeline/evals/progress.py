"""Progress of a long evaluation on rank 0: a bar on a terminal, else a log line every 10 s."""

import io
import logging
import sys

from tqdm import tqdm

from pipeline.distributed.logging import env_rank

logger = logging.getLogger(__name__)

LOG_EVERY = 10.0  # seconds
LINE = "{desc}: {percentage:.0f}% of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"


def progress_bar(description: str, images: int) -> tqdm:
    """Return a tqdm over so many images, with rate and remaining time; silent on other ranks than 0."""
    options = {"unit": " images", "unit_scale": True, "leave": False, "disable": env_rank() != 0}
    if sys.stderr.isatty():
        return tqdm(desc=description, total=images, delay=1, dynamic_ncols=True, **options)
    options |= {"delay": LOG_EVERY, "mininterval": LOG_EVERY, "bar_format": LINE, "file": io.StringIO()}
    return _ProgressLines(desc=description, total=images, **options)


class _ProgressLines(tqdm):
    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # with a text tqdm clears the bar
            logger.info(str(self))
