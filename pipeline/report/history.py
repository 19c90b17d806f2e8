"""Read the history of a run from its directory: metrics, starts, and what the guard did.

Invariant: everything comes from files that the run wrote; the run may still be training.
"""

import json
import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.io.metrics_file import NON_LOSS_COLUMNS, read_metrics
from pipeline.recipe.loading import DEPRECATED_KEYS, flatten, read_yaml
from pipeline.train.guard import SkippedStep
from pipeline.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """The first start of a run, or a resume."""

    time: float
    """Seconds since 1970."""
    step: int
    last_logged: dict | None
    """Step and time of the last line logged before it; None for the first start."""
    environment: dict
    """The entry of environment.json."""

    @property
    def num_repeated_steps(self) -> int:
        """Logged steps that were lost and trained again."""
        return max(0, self.last_logged["step"] - self.step) if self.last_logged else 0

    @property
    def downtime(self) -> float | None:
        """Seconds from the last logged line to this start; None if unknown."""
        stopped = self.last_logged["time"] if self.last_logged else None
        return self.time - stopped if stopped else None


@dataclass(frozen=True)
class History:
    path: Path
    lines: list[dict]
    """Lines of metrics.jsonl without events; at least one."""
    rollbacks: list[dict]
    """Rollback events of the guard, oldest first."""
    stop: dict | None
    """The event with which the guard ended the run."""
    starts: list[Start]
    recipe: dict
    recipe_text: str
    pictures: list[Path]
    """Reconstructions, oldest first."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def loss_columns(self) -> list[str]:
        """The loss, then its terms."""
        evaluated = {f"{name}{end}" for name in self.accuracy_columns for end in ("", "_low", "_high")}
        return ["loss", *sorted(self.lines[0].keys() - NON_LOSS_COLUMNS - evaluated - {"loss"})]

    @property
    def accuracy_columns(self) -> list[str]:
        """The columns that have a confidence interval."""
        names = {name for line in self.lines for name in line}
        return sorted(name for name in names if f"{name}_low" in names)

    @property
    def skipped_steps(self) -> list[SkippedStep]:
        """Skipped steps, except those that a rollback discarded."""
        return [SkippedStep(**skip) for line in self.lines for skip in line.get("skipped_steps", [])]

    @property
    def has_times(self) -> bool:
        return all(line.get("time") for line in self.lines)

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of the lines in which the column is not null."""
        rows = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        return [step for step, _ in rows], [value for _, value in rows]


def read_history(run: Path) -> History:
    """Read the history of a run. Raises UserError if it is not a run directory or has no metrics yet."""
    directory = RunDirectory(run)
    if not directory.metrics.is_file():
        raise UserError(f"{run}: not a run directory (it has no {directory.metrics.name})")
    entries = read_metrics_log(directory)
    try:
        starts = [
            Start(datetime.fromisoformat(entry["time"]).timestamp(), entry["step"], entry.get("before"), entry)
            for entry in json.loads(directory.environment.read_text())["starts"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory.environment}: cannot be read: {error!r}; restore it") from error
    lines = [entry for entry in entries if "event" not in entry]
    if not lines:
        raise UserError(f"{run}: no metrics yet; a line is logged every train.log_every steps")
    return History(
        path=run,
        lines=lines,
        rollbacks=[entry for entry in entries if entry.get("event") == "rollback"],
        stop=next((entry for entry in entries if entry.get("event") == "stop"), None),
        starts=starts,
        recipe=read_yaml(directory.recipe_file),
        recipe_text=directory.recipe_file.read_text(),
        pictures=sorted(directory.reconstructions.glob("step-*.png")),
    )


def read_metrics_log(run: RunDirectory) -> list[dict]:
    """Read the lines of metrics.jsonl, events included; damaged ones are ignored with a warning."""
    try:
        lines, damaged = read_metrics(run.metrics)
    except OSError as error:
        raise UserError(f"{run.metrics}: cannot be read: {error.strerror}; check its permissions") from error
    if damaged:
        logger.warning(f"{run.metrics}: ignored {damaged} damaged lines")
    return lines


def differences(histories: list[History]) -> dict[str, list]:
    """Return the recipe keys in which the runs differ, with each run's value, None if it lacks the key."""
    recipes = [
        {DEPRECATED_KEYS.get(key, key): value for key, value in flatten(history.recipe).items()}
        for history in histories
    ]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}
