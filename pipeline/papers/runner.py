"""Run the commands of an experiment and collect their results.

    DIR/pretrain-1a2b3c4d/            run directory of a command
    DIR/pretrain-1a2b3c4d.done.json   its result, written when the command has succeeded
    DIR/NAME.json, NAME.md, NAME.png  table of published and measured values, rewritten after every command

Invariant: a command with a result is not run again; one without is started again and resumes by itself. So an
interruption at any moment loses nothing, and the same command continues.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pipeline.errors import Diverged, StoppedEarly, UserError
from pipeline.io.atomic import read_json, write_json
from pipeline.io.metrics_file import read_metrics
from pipeline.papers import difficulty_profile, report
from pipeline.papers.commands import Command, RowPlan, plan_experiment
from pipeline.papers.experiment import COLUMNS, ColumnName, Experiment
from pipeline.papers.measures import compute
from pipeline.papers.report import Measured
from pipeline.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = {75, *(-number for number in STOP_SIGNALS), *(128 + number for number in STOP_SIGNALS)}
"""Exit codes of a command that was stopped and can be continued."""
DIVERGED = 4
"""Exit code of a command whose training diverged."""


def run_experiment(
    experiment: Experiment, directory: Path, data: str | None, val: str | None, overrides: Sequence[str], launcher: str
) -> Path:
    """Run what is missing of an experiment and write its table.

    Args:
        experiment: What to run.
        directory: For run directories and results; may hold other experiments.
        data: Labeled shard set to train on; None: run nothing.
        val: Labeled shard set to evaluate on; None: run only pre-training.
        overrides: As for `plan_experiment`.
        launcher: Command before "pipeline", for example "deepspeed --module".

    Returns:
        The table, a Markdown file.

    Raises:
        UserError: If an argument is invalid or a command fails.
        StoppedEarly: If a command was stopped.
        Diverged: If the training of a row diverged, after the other rows have been run.
    """
    plans = plan_experiment(experiment, overrides)
    _check_arguments(experiment, data, val)
    launcher_words = _launcher_words(launcher)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run {directory}: cannot be created: {error.strerror}; give another directory") from error
    results = [_compute_columns(experiment, plan) for plan in plans]
    for plan, result in zip(plans, results, strict=True):
        for command in plan.commands:
            result |= _read_record(command, directory, data, val) or {}

    def write(trained: Path | None = None) -> Path:
        if experiment.profile:
            return difficulty_profile.write(experiment, plans[0].recipe, directory, trained, val or data, overrides)
        return report.write(experiment, directory, plans, results, overrides)

    path = write()
    diverged: dict[str, str] = {}
    for number, plan in enumerate(plans):
        for command in plan.commands if data else ():
            if (command.weights and val is None) or diverged.keys() & {command.run, command.weights}:
                continue
            if (result := _read_record(command, directory, data, val)) is None:
                logger.info(f"{experiment.name}: row {number + 1} of {len(plans)}, {plan.row.name}: {command.step}")
                if not _execute(command, directory, str(data), val, launcher_words):
                    diverged[command.run] = plan.row.name
                    continue
                result = _read_record(command, directory, data, val) or {}
            results[number] |= result
            path = write(directory / command.run)
    if diverged:
        rows = ", ".join(f"{name} ({directory / run})" for run, name in diverged.items())
        raise Diverged(f"{experiment.name}: training diverged in {rows}; {path} has the other rows")
    return path


def _check_arguments(experiment: Experiment, data: str | None, val: str | None) -> None:
    for name, path in (("--data", data), ("--val", val)):
        if path == "":
            raise UserError(f"{name}: is empty; give a labeled shard set")
    needs_data = all(COLUMNS[column].step for column in experiment.columns) and not experiment.profile
    if data is None and val is not None:
        raise UserError("--val: is used only with --data; give both or neither")
    if data is None and needs_data:
        raise UserError(f"--data: {experiment.name} trains models; give a labeled shard set")


def _compute_columns(experiment: Experiment, plan: RowPlan) -> dict[ColumnName, Measured]:
    names: list[ColumnName] = [column for column in experiment.columns if COLUMNS[column].step is None]
    return {column: Measured(compute(column, plan.row, plan.recipe)) for column in names}


def _record_file(command: Command, directory: Path) -> Path:
    return directory / f"{command.run}.done.json"


def _read_record(
    command: Command, directory: Path, data: str | None, val: str | None
) -> dict[ColumnName, Measured] | None:
    """Return the result of a command that has succeeded, else None.

    Raises:
        UserError: If it was made with other shard sets than those given.
    """
    path = _record_file(command, directory)
    if not path.exists():
        return None
    record = read_json(path)
    given = {name: value for name, value in _inputs(command, data, val).items() if value is not None}
    if not given.items() <= record["inputs"].items():
        raise UserError(
            f"{path}: was made with other shard sets, {record['inputs']}; give the same --data and --val, or another "
            "--run"
        )
    return {cast(ColumnName, column): Measured(*values) for column, values in record["result"].items()}


def _execute(command: Command, directory: Path, data: str, val: str | None, launcher: list[str]) -> bool:
    """Run a command and record its result. Returns False if its training diverged."""
    arguments = command.words(str(directory), data, val)
    words = [*launcher, "pipeline", *arguments]
    code, was_signaled = _run(words)
    if code == DIVERGED:
        return False
    if code and code not in STOPPED and not was_signaled:
        raise UserError(f"`{shlex.join(words)}` failed with exit code {code}; fix it, and run the same command again")
    if not code:
        result = _read_result(command, directory / command.run)
        record = {"inputs": _inputs(command, data, val), "command": arguments, "result": result}
        write_json(_record_file(command, directory), record)
    if code or was_signaled:
        raise StoppedEarly(f"`{shlex.join(words)}` was stopped; run the same command again to continue")
    return True


def _inputs(command: Command, data: str | None, val: str | None) -> dict[str, str | None]:
    """Return the shard sets of a command."""
    return {"data": data and data.rstrip("/"), "val": val and val.rstrip("/") if command.weights else None}


def _read_result(command: Command, run: Path) -> dict[str, list[float]]:
    if command.step == "pretrain":
        losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")[0] if "loss" in line]
        return {"loss": [losses[-1]]} if losses else {}
    results = read_json(RunDirectory(run).existing_results)
    accuracy = results["knn"][0]["top1"] if command.step == "knn" else results["top1"]
    return {command.step: [100 * accuracy[key] for key in ("accuracy", "low", "high")]}


def _launcher_words(launcher: str) -> list[str]:
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"--launcher {launcher}: {error}; fix the quotes") from error
    return [sys.executable if word == "python" else word for word in words]


def _run(words: list[str]) -> tuple[int, bool]:
    """Run a command to its end; its output goes to stderr. It stops and saves if this process is killed.

    Returns:
        Its exit code, and whether this process received a signal to stop, which is forwarded.
    """
    running: list[subprocess.Popen] = []
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for process in running:
            process.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        running.append(subprocess.Popen(words, stdout=2, env={**os.environ, "SHARDMAE_WATCH_PARENT": "1"}))
        for number in received:  # while the command was being started
            running[0].send_signal(number)
        try:
            code = running[0].wait()
        except KeyboardInterrupt:  # the terminal has interrupted the command, too
            running[0].wait()
            raise
    except OSError as error:
        raise UserError(f"--launcher: {words[0]} cannot be started: {error.strerror}") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, bool(received)
