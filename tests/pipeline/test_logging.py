"""Log records have time, level and rank; ranks other than 0 print only errors and records for all ranks."""

import logging
import re

import pytest

from pipeline.distributed.logging import ALL_RANKS, env_rank, setup_logging

logger = logging.getLogger("pipeline.example")
LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING|ERROR) rank (\d)\] (.+)")


@pytest.fixture
def rank(monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return lambda variable, number: monkeypatch.setenv(variable, str(number))


def log_all(capsys) -> list[tuple]:
    """Log a record of every kind. Returns (level, rank, text) of those that were printed."""
    capsys.readouterr()
    logger.debug("debug")
    logger.info("info")
    logger.warning("warning")
    logger.error("error")
    logger.info("info of all", extra=ALL_RANKS)
    logger.warning("warning of all", extra=ALL_RANKS)
    captured = capsys.readouterr()
    assert not captured.out
    matches = [LINE.fullmatch(line) for line in captured.err.splitlines()]
    return [match.groups() if match else () for match in matches]


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_other_ranks_print_errors_and_all_ranks_records(rank, capsys, variable):
    rank(variable, 3)
    assert env_rank() == 3
    assert log_all(capsys) == [
        ("ERROR", "3", "error"),
        ("INFO", "3", "info of all"),
        ("WARNING", "3", "warning of all"),
    ]


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", None])
def test_rank_0_prints_everything_from_info_on(rank, capsys, variable):
    if variable:
        rank(variable, 0)
    assert log_all(capsys) == [
        ("INFO", "0", "info"),
        ("WARNING", "0", "warning"),
        ("ERROR", "0", "error"),
        ("INFO", "0", "info of all"),
        ("WARNING", "0", "warning of all"),
    ]


def test_setup_twice_prints_each_record_once(rank, capsys):
    setup_logging()
    setup_logging()
    assert len(log_all(capsys)) == 5
    logging.getLogger("data_prep.example").info("record")
    assert capsys.readouterr().err.count("record") == 1
