"""What ranks hear is weighed before it is agreed on: the gravest reason stands."""

import subprocess
import sys

ORPHAN = """
import os, sys, time
import torch.distributed as dist
from pipeline.train.stopping import LAUNCHER_GONE, UNWRITTEN, Stopping

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
os.environ["TORCHELASTIC_RUN_ID"] = "none"
stopping = Stopping()
stopping.connect(1.0)
with stopping.writing():
    raise OSError(28, "No space left on device")
os.write(int(sys.argv[1]), b"ready")
time.sleep(2.5)
print(stopping.settle(), stopping.reason == UNWRITTEN, flush=True)
os._exit(0)
"""
LAUNCHER = """
import os, subprocess, sys

reading, writing = os.pipe()
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(writing)], pass_fds=[writing])
os.read(reading, 5)
"""


def test_a_launcher_that_goes_does_not_make_a_full_disk_forgotten():
    command = [sys.executable, "-c", LAUNCHER, ORPHAN]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "the launcher is gone" in ended.stderr, ended.stderr
    assert ended.stdout.split() == ["False", "True"]
