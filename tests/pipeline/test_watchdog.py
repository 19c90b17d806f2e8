"""A process without progress writes its stacks and exits; one with progress is not affected."""

import pytest
from forkserver import run as fork

START = """
import ctypes, sys, time
from pathlib import Path
from pipeline.train.run_directory import RunDirectory
from pipeline.train.watchdog import Watchdog
watchdog = Watchdog(RunDirectory(Path(sys.argv[1])), 3, 1.0)
"""


def run_script(tmp_path, script):
    """Return the exit code, and the stacks if there are any."""
    finished = fork(["-c", START + script, tmp_path], timeout=60)
    path = tmp_path / "stacks" / "rank-3.txt"
    return finished.returncode, path.read_text() if path.exists() else None


@pytest.mark.parametrize(
    ("hang", "code"),
    [
        ("def hanging_function(): time.sleep(25)\nhanging_function()", 3),
        # PyDLL keeps the interpreter lock, so that no other Python thread runs.
        ("def hanging_function(): ctypes.PyDLL(None).sleep(25)\nhanging_function()", 1),
    ],
)
def test_hanging_process_exits_and_writes_its_stacks(tmp_path, hang, code):
    returncode, stacks = run_script(tmp_path, hang)
    assert returncode == code and stacks and "in hanging_function" in stacks


def test_heartbeats_keep_a_process_running(tmp_path):
    script = "for _ in range(10):\n  time.sleep(0.2); watchdog.heartbeat()\nwatchdog.close()"
    assert run_script(tmp_path, script) == (0, None)


def test_stacks_of_earlier_starts_are_kept(tmp_path):
    for name in ("first_hang", "second_hang"):
        assert run_script(tmp_path, f"def {name}(): time.sleep(25)\n{name}()")[0] == 3
    assert run_script(tmp_path, "watchdog.close()") == (0, None)
    first, second = sorted((tmp_path / "stacks").glob("rank-3.*-*.txt"))
    assert "in first_hang" in first.read_text() and "in second_hang" in second.read_text()


def test_timeout_is_extended_only_inside_the_block(tmp_path):
    slow = "with watchdog.extended_timeout():\n  time.sleep(2.5)\n"
    assert run_script(tmp_path, slow + "watchdog.close()") == (0, None)
    hang = "def hanging_function(): time.sleep(25)\nhanging_function()"
    returncode, stacks = run_script(tmp_path, slow + hang)
    assert returncode == 3 and stacks and "in hanging_function" in stacks
