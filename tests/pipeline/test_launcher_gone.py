"""Of several stop requests of a rank the most serious one decides."""

from forkserver import run

FULL_DISK_THEN_DEAD_LAUNCHER = """
import os, threading, time
import torch.distributed as dist
from pipeline.distributed.logging import setup_logging
from pipeline.train.preemption import WRITE_ERROR, PreemptionHandler

setup_logging()
ready, set_ready = os.pipe()
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
    preemption = PreemptionHandler()
    preemption.connect(1.0)
    with preemption.catch_write_errors():
        raise OSError(28, "No space left on device")
    os.write(set_ready, b"1")
    while any("(_watch_launcher)" in thread.name for thread in threading.enumerate()):
        time.sleep(0.01)
    print(preemption.sync_write_errors(), preemption.stop_reason == WRITE_ERROR, flush=True)
    os._exit(0)
"""


def test_dead_launcher_does_not_hide_a_write_error():
    ended = run(["-c", FULL_DISK_THEN_DEAD_LAUNCHER], timeout=120)
    assert "launcher died" in ended.stderr, ended.stderr
    assert ended.stdout.split() == ["False", "True"]
