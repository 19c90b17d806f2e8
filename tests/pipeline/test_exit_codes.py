"""How exceptions become a line on stderr and an exit code, and on which ranks the line is printed."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from pipeline.commands.exit_codes import run_command
from pipeline.errors import AllRanksError, Diverged, StoppedEarly, StorageTimeout, UserError

CODE = "import sys; from pipeline.commands.exit_codes import run_command; sys.exit(run_command(lambda: {}))"
PRINT = CODE.format("print('x' * {})")
BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("error", "code", "on_all_ranks"),
    [
        (UserError("x: bad"), 2, True),
        (StorageTimeout("x: bad"), 2, True),
        (OSError(errno.ENOSPC, "full", "x: bad"), 2, True),
        (torch.OutOfMemoryError("x: bad. Tried to allocate 2 GiB. See documentation."), 2, True),
        (AllRanksError("x: bad"), 2, False),
        (Diverged("x: bad"), 4, False),
        (StoppedEarly("x: bad"), 75, False),
    ],
)
def test_rank_0_alone_prints_what_all_ranks_raise(monkeypatch, capsys, rank, error, code, on_all_ranks):
    def command():
        raise error

    monkeypatch.setenv("RANK", rank)
    assert run_command(command) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (on_all_ranks or rank == "0")
    assert all(line.startswith("pipeline: ") and "x: bad" in line for line in lines)


@pytest.mark.parametrize("letters", [1, 1 << 20])
def test_a_closed_pipe_ends_a_command_silently(letters):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-c", PRINT.format(letters)], stdout=writer, stderr=subprocess.PIPE, env=BUFFERED
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", PRINT.format(1)]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "error: No space left on device" in ended.stderr


def test_another_broken_pipe_is_not_a_user_error():
    code = CODE.format("exec('raise BrokenPipeError(32, \\'x\\')')")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1 and "BrokenPipeError" in ended.stderr
