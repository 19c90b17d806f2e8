"""One job at a time uses a run directory; a file system without locks is a warning."""

import errno
import fcntl
import os

import pytest

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.train.run_directory import RunDirectory

RECIPE = load_recipe("demo_emae")


def test_second_job_is_rejected_and_named_the_holder(tmp_path, capsys):
    run = RunDirectory(tmp_path)
    holder = rf"--run {tmp_path}: .*\(process {os.getpid()} on "
    with run.lock(RECIPE), pytest.raises(UserError, match=holder), run.lock(RECIPE, timeout_s=0.6):
        pass
    assert f"{tmp_path}: in use by process {os.getpid()} on " in capsys.readouterr().err
    with run.lock(RECIPE):
        pass
    assert not capsys.readouterr().err


def test_lock_writes_the_recipe_of_a_new_run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.lock(RECIPE):
        assert load_recipe(run.recipe_file) == RECIPE
    with pytest.raises(UserError, match="seed was 0, is 1"), run.lock(load_recipe("demo_emae", ["seed=1"])):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    # Simulated: Linux can lock files on every local file system. Lustre mounted without flock returns ENOSYS.
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunDirectory(tmp_path).lock(RECIPE, timeout_s=0.1):
        pass
    log = capsys.readouterr().err
    assert f" WARNING rank 0] {tmp_path}: " in log and os.strerror(number) in log and log.count("\n") == 1
