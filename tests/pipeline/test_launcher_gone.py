"""What ranks hear is weighed before it is agreed on: the gravest reason stands."""

from forkserver import run

FULL_DISK_AND_NO_LAUNCHER = """
import os, threading, time
import torch.distributed as dist
from pipeline.train.preemption import UNWRITTEN, Stopping

ready, tell = os.pipe()
ended, alive = os.pipe()
if launcher := os.fork():
    os.close(alive)
    os.waitpid(launcher, 0)
    os.read(ended, 1)  # until the rank has ended
elif os.fork():
    os.read(ready, 1)
    os._exit(0)
else:
    os.close(ended)
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    stopping = Stopping()
    stopping.connect(1.0)
    with stopping.writing():
        raise OSError(28, "No space left on device")
    os.write(tell, b"1")
    while any("_watch_launcher" in thread.name for thread in threading.enumerate()):
        time.sleep(0.01)
    print(stopping.settle(), stopping.reason == UNWRITTEN, flush=True)
    os._exit(0)
"""


def test_a_launcher_that_goes_does_not_make_a_full_disk_forgotten():
    ended = run(["-c", FULL_DISK_AND_NO_LAUNCHER], timeout=120)
    assert "the launcher is gone" in ended.stderr, ended.stderr
    assert ended.stdout.split() == ["False", "True"]
