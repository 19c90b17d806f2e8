"""The lock of a run directory: one run at a time, and a word where the file system has none."""

import errno
import fcntl
import os

import pytest

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.train import run_directory

RECIPE = load_recipe("demo_emae")


def test_who_comes_second_is_told_who_is_at_work(tmp_path, capsys):
    held = run_directory.lock_run_dir(tmp_path, RECIPE)
    refused = run_directory.lock_run_dir(tmp_path, RECIPE, timeout_s=0.6)
    said = rf"another run is at work there \(process {os.getpid()} on "
    with held, pytest.raises(UserError, match=said), refused:
        pass
    with run_directory.lock_run_dir(tmp_path, RECIPE):
        pass
    assert "warning" not in capsys.readouterr().err


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    # A file system without locks (Lustre mounted so) cannot be made on one machine: Linux always gives them.
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_directory.lock_run_dir(tmp_path, RECIPE):
        pass
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path}: this file system has no locks") and said.count("\n") == 1
