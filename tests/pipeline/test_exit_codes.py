"""How a command ends whose output nobody takes."""

import os
import subprocess
import sys

import pytest

PRINTING = "import sys; from pipeline.commands.exit_codes import exit_code_of; sys.exit(exit_code_of(lambda: print('x' * {})))"


@pytest.mark.parametrize("letters", [1, 1 << 20])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(letters):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-c", PRINTING.format(letters)], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", PRINTING.format(1)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "error: No space left on device; make room" in ended.stderr


def test_a_broken_pipe_that_is_not_the_output_is_a_fault():
    breaking = PRINTING.replace(
        "lambda: print('x' * {})", "lambda: exec('raise BrokenPipeError(32, \\'x\\')')"
    )
    ended = subprocess.run([sys.executable, "-c", breaking], capture_output=True, text=True)
    assert ended.returncode == 1 and "BrokenPipeError" in ended.stderr
