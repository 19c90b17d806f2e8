"""The lock of a run directory: one run at a time, and a word where the file system has none."""

import errno
import fcntl
import os

import pytest

from pipeline.errors import UserError
from pipeline.train import run_directory


def test_who_comes_second_is_told_who_is_at_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_directory, "LOCK_PATIENCE", 0.6)
    held = run_directory.lock(tmp_path)
    with pytest.raises(UserError, match=rf"another run is at work there \(process {os.getpid()} on "):
        run_directory.lock(tmp_path)
    os.close(held)
    os.close(run_directory.lock(tmp_path))
    assert "warning" not in capsys.readouterr().err


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    os.close(run_directory.lock(tmp_path))
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path}: this file system has no locks") and said.count("\n") == 1
