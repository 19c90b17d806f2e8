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

from pipeline.errors import StoppedEarly, UserError
from pipeline.io.atomic import read_json, write_json
from pipeline.io.metrics_file import read_metrics
from pipeline.papers import difficulty_profile, report
from pipeline.papers.commands import Command, RowPlan, plan_experiment
from pipeline.papers.experiment import COLUMNS, ColumnName, Experiment
from pipeline.papers.measures import compute
from pipeline.papers.report import Measured
from pipeline.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)
STOPPED = (75, 130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1)
"""Exit codes of a command that was stopped and can be continued."""


def run_experiment(
    experiment: Experiment, directory: Path, data: str | None, val: str | None, overrides: Sequence[str], launcher: str
) -> Path:
    """Run what is missing of an experiment and write its table.

    Args:
        experiment: What to run.
        directory: For run directories and results; may hold other experiments.
        data: Labeled shard set to train on; None: only columns that are computed from the recipes.
        val: Labeled shard set to evaluate on; None: pre-training only.
        overrides: As for `plan_experiment`.
        launcher: Command before "pipeline", for example "deepspeed --module".

    Returns:
        The table, a Markdown file.

    Raises:
        UserError: If an argument is invalid or a command fails.
        StoppedEarly: If a command was stopped.
    """
    plans = plan_experiment(experiment, overrides)
    needs_data = all(COLUMNS[column].step for column in experiment.columns) and not experiment.profile
    if needs_data and data is None:
        raise UserError(f"--data: {experiment.name} trains models; give a labeled shard set")
    directory.mkdir(parents=True, exist_ok=True)
    results = [_compute_columns(experiment, plan) for plan in plans]

    def write(trained: Path | None = None) -> Path:
        if experiment.profile:
            return difficulty_profile.write(experiment, plans[0].recipe, directory, trained, val or data)
        return report.write(experiment, directory, plans, results)

    path = write()
    for number, plan in enumerate(plans):
        for command in plan.commands if data else ():
            if command.weights and val is None:
                continue
            logger.info(f"{experiment.name}: row {number + 1} of {len(plans)}, {plan.row.name}: {command.step}")
            results[number] |= _result(command, directory, str(data), val, launcher)
            path = write(directory / command.run)
    return path


def _compute_columns(experiment: Experiment, plan: RowPlan) -> dict[ColumnName, Measured]:
    names: list[ColumnName] = [column for column in experiment.columns if COLUMNS[column].step is None]
    return {column: Measured(compute(column, plan.row, plan.recipe)) for column in names}


def _result(command: Command, directory: Path, data: str, val: str | None, launcher: str) -> dict[ColumnName, Measured]:
    """Return a command's result. Runs the command if it has none."""
    done, run = directory / f"{command.run}.done.json", directory / command.run
    inputs = {"data": data, "val": val if command.weights else None}
    if done.exists():
        record = read_json(done)
        if record.get("inputs") != inputs:
            raise UserError(
                f"{done}: was made with other shard sets, {record.get('inputs')}; give the same --data and --val, or "
                "another --run"
            )
    else:
        arguments = command.words(str(directory), data, val)
        _run([*_launcher_words(launcher), "pipeline", *arguments])
        record = {"inputs": inputs, "command": arguments, "result": _read_result(command, run)}
        write_json(done, record)
    return {cast(ColumnName, column): Measured(*values) for column, values in record["result"].items()}


def _read_result(command: Command, run: Path) -> dict[str, list[float]]:
    if command.step == "pretrain":
        losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")[0] if "loss" in line]
        return {"loss": [losses[-1]]} if losses else {}
    accuracy = read_json(RunDirectory(run).existing_results)["top1"]
    return {command.step: [100 * accuracy[key] for key in ("accuracy", "low", "high")]}


def _launcher_words(launcher: str) -> list[str]:
    words = shlex.split(launcher)
    return [sys.executable if word == "python" else word for word in words]


def _run(words: list[str]) -> None:
    """Run a command to its end; its output goes to stderr. It stops and saves if this process is killed."""
    running: list[subprocess.Popen] = []

    def forward(number: int, _: object) -> None:
        for process in running:
            process.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        running.append(subprocess.Popen(words, stdout=2, env={**os.environ, "SHARDMAE_WATCH_PARENT": "1"}))
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
    if code in STOPPED:
        raise StoppedEarly(f"`{shlex.join(words)}` was stopped; run the same command again to continue")
    if code:
        raise UserError(f"`{shlex.join(words)}` failed with exit code {code}; fix it, and run the same command again")
