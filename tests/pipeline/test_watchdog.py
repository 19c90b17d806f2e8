"""A process that makes no progress ends, and says where it was; one that does is left alone."""

import pytest
from forkserver import run

START = "import ctypes, sys, time\nfrom pathlib import Path\nfrom pipeline.train.watchdog import Watchdog\n"
START += "dog = Watchdog(Path(sys.argv[1]), 3, 1.0)\n"


def end_of(tmp_path, script):
    done = run(["-c", START + script, tmp_path], timeout=60)
    path = tmp_path / "stacks" / "rank-3.txt"
    return done.returncode, path.read_text() if path.exists() else None


@pytest.mark.parametrize(
    ("hang", "code"),
    [
        ("def waits_for_ever(): time.sleep(25)\nwaits_for_ever()", 3),
        # PyDLL keeps the interpreter's lock, so that no other thread runs
        ("def waits_for_ever(): ctypes.PyDLL(None).sleep(25)\nwaits_for_ever()", 1),
    ],
)
def test_a_process_that_hangs_ends_and_leaves_its_stack(tmp_path, hang, code):
    returned, stacks = end_of(tmp_path, hang)
    assert returned == code and "in waits_for_ever" in stacks


def test_a_process_that_is_alive_is_left_alone_and_leaves_nothing(tmp_path):
    assert end_of(tmp_path, "for _ in range(10):\n  time.sleep(0.2); dog.alive()\ndog.close()") == (0, None)


def test_the_stacks_of_a_rank_that_hung_outlive_the_starts_that_follow(tmp_path):
    for name in ("hangs_first", "hangs_then"):
        assert end_of(tmp_path, f"def {name}(): time.sleep(25)\n{name}()")[0] == 3
    assert end_of(tmp_path, "dog.close()") == (0, None)
    first, then = sorted((tmp_path / "stacks").glob("rank-3.*-*.txt"))
    assert "in hangs_first" in first.read_text() and "in hangs_then" in then.read_text()


def test_it_is_patient_with_a_slow_checkpoint_and_no_longer(tmp_path):
    slow = "with dog.patient():\n  time.sleep(2.5)\n"
    assert end_of(tmp_path, slow + "dog.close()") == (0, None)
    returned, stacks = end_of(tmp_path, slow + "def waits_for_ever(): time.sleep(25)\nwaits_for_ever()")
    assert returned == 3 and "in waits_for_ever" in stacks
