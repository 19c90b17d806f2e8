"""What a run directory tells of its run: the numbers, what interrupted it, where the guard stepped in.

Invariant: everything comes from files that the run wrote; a run at work may be read.
"""

import json
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import yaml

from pipeline.errors import UserError
from pipeline.io.metrics_file import NO_LOSS, read_lines
from pipeline.recipe.loading import flat, read_yaml

METRICS = "metrics.jsonl"


class Skip(NamedTuple):
    """A step that the guard skipped."""

    step: int
    reason: str
    loss: float | None
    grad_norm: float | None


class Start(NamedTuple):
    """A beginning or continuation of the run."""

    time: float
    """Seconds since 1970."""
    step: int
    before: dict | None
    """{"step", "time"}: the last that was logged before it; None at the beginning."""
    facts: dict
    """The rest, as in environment.json."""

    @property
    def repeated(self) -> int:
        """Logged steps that had to be computed again."""
        return max(0, self.before["step"] - self.step) if self.before else 0

    @property
    def away(self) -> float | None:
        """Seconds from the last logged line to this start."""
        return self.time - self.before["time"] if self.before and self.before["time"] else None


@dataclass(frozen=True)
class History:
    """One run."""

    path: Path
    lines: list[dict]
    """Of metrics.jsonl, without events; at least one."""
    rollbacks: list[dict]
    """The guard's, in their order."""
    stop: dict | None
    """The guard's, where it gave up."""
    starts: list[Start]
    recipe_text: str
    pictures: list[Path]
    """Reconstructions, oldest first."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def recipe(self) -> dict:
        return yaml.safe_load(self.recipe_text)

    @property
    def losses(self) -> list[str]:
        """The loss and its parts, by name."""
        judged = {f"{name}{end}" for name in self.accuracies for end in ("", "_low", "_high")}
        return ["loss", *sorted(self.lines[0].keys() - NO_LOSS - judged - {"loss"})]

    @property
    def accuracies(self) -> list[str]:
        """What was measured now and then, with an interval, by name."""
        names = {name for line in self.lines for name in line}
        return sorted(name for name in names if f"{name}_low" in names)

    @property
    def skips(self) -> list[Skip]:
        """Skipped steps that are part of the history; those that a return took back are the return's."""
        return [Skip(**skip) for line in self.lines for skip in line.get("skipped_steps", [])]

    @property
    def timed(self) -> bool:
        """Whether every line has its time."""
        return all(line.get("time") for line in self.lines)

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column, where it has one."""
        rows = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        return [step for step, _ in rows], [value for _, value in rows]


def read_history(run: Path) -> History:
    """UserError where `run` is no run directory, or has logged nothing yet."""
    if not (run / METRICS).is_file():
        raise UserError(f"{run}: no run directory (no {METRICS}); `python -m pipeline pretrain` makes one")
    lines = logged(run)
    try:
        starts = [_start(facts) for facts in json.loads((run / "environment.json").read_text())["starts"]]
        recipe_text = (run / "recipe.yaml").read_text()
        read_yaml(run / "recipe.yaml")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}: cannot be read as a run directory: {error}") from None
    trained = [line for line in lines if "event" not in line]
    if not trained:
        raise UserError(f"{run}: nothing is logged yet; a line comes every train.log_every steps")
    events = [line for line in lines if "event" in line]
    return History(
        path=run,
        lines=trained,
        rollbacks=[event for event in events if event["event"] == "rollback"],
        stop=next((event for event in events if event["event"] == "stop"), None),
        starts=starts,
        recipe_text=recipe_text,
        pictures=sorted((run / "reconstructions").glob("step-*.png")),
    )


def logged(run: Path) -> list[dict]:
    """What a run has logged, events among it; what cannot be read of it is left out with a warning."""
    try:
        lines, damaged = read_lines(run / METRICS)
    except OSError as error:
        raise UserError(f"{run / METRICS}: cannot be read: {error.strerror}") from None
    if damaged:
        print(f"warning: {run / METRICS}: {damaged} lines cannot be read and are left out", file=sys.stderr)
    return lines


def differences(histories: list[History]) -> dict[str, list]:
    """Recipe keys in which the runs differ: each run's value, None where it lacks the key."""
    recipes = [flat(history.recipe) for history in histories]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _start(facts: dict) -> Start:
    at = datetime.fromisoformat(facts["time"]).timestamp()
    return Start(at, facts["step"], facts.get("before"), facts)
