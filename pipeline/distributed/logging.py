"""Logging of the processes of a run: time, level and rank, on stderr.

Records below ERROR are printed by rank 0 only, unless they are logged with `extra=ALL_RANKS`.
"""

import logging
import os
import sys

ALL_RANKS = {"all_ranks": True}
"""`extra` of a record that concerns one rank and that every rank prints."""


def setup_logging() -> None:
    """Send the records of `pipeline` and `data_prep` to stderr. Commands call it once, at their start."""
    if logging.getLogger("pipeline").handlers:
        return
    handler = _Handler()
    handler.setFormatter(
        logging.Formatter("[%(asctime)s %(levelname)s rank %(rank)d] %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    handler.addFilter(_filter)
    for name in ("pipeline", "data_prep"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def env_rank() -> int:
    """Return the rank in the launcher's environment, 0 without one. Imports neither torch nor DeepSpeed."""
    text = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(text) if text.isdecimal() else 0


class _Handler(logging.Handler):
    """Writes around a progress bar, if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _filter(record: logging.LogRecord) -> bool:
    rank = env_rank()
    setattr(record, "rank", rank)  # noqa: B010 (LogRecord declares no such attribute)
    return not rank or record.levelno >= logging.ERROR or getattr(record, "all_ranks", False)
