"""Time that the agreement on stop requests adds to a step, on two ranks, if the network delays it.

    python benchmarks/agreement.py [--delay 5] [--step 20]      milliseconds

A step sleeps instead of computing, as the host does while a GPU computes. Each rank's all_reduce starts `delay` ms
late, as on a slow network. Compares the agreement of training, one micro batch late, with one that is waited for.
"""

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from pipeline.train import preemption
from pipeline.train.preemption import PreemptionHandler

STEPS = 50


class DelayedWork:
    """A collective that a thread starts when `delay_s` have passed."""

    def __init__(self, start, delay_s: float):
        self._thread = threading.Thread(target=lambda: (time.sleep(delay_s), start().wait()))
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()


class Source:
    def next(self) -> int:
        return 0


def run(rank: int, rendezvous: str, delay_s: float, step_s: float, results) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    handler, source, all_reduce = PreemptionHandler(), Source(), dist.all_reduce
    handler.connect(1.0)

    def delayed(tensor: torch.Tensor, *args, async_op: bool = False, **kwargs):
        work = DelayedWork(lambda: all_reduce(tensor, *args, async_op=True, **kwargs), delay_s)
        return work if async_op else work.wait()

    preemption.dist.all_reduce = delayed
    for late in (True, False):
        times = []
        for _ in range(STEPS):
            started = time.perf_counter()
            if late:
                handler.next_batch(source)
            else:
                handler._sync(0)
            time.sleep(step_s)
            times.append(time.perf_counter() - started)
        if late:
            handler.discard_ahead()
        if rank == 0:
            results[late] = statistics.median(times)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=5.0)
    parser.add_argument("--step", type=float, default=20.0)
    args = parser.parse_args()
    with torch.multiprocessing.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        for delay in (0.0, args.delay):
            results, rendezvous = manager.dict(), (Path(folder) / f"{delay}").as_uri()
            torch.multiprocessing.spawn(run, (rendezvous, delay / 1e3, args.step / 1e3, results), nprocs=2)
            late, at_once = (f"{1e3 * results[key] - args.step:.2f} ms" for key in (True, False))
            print(
                f"all_reduce delayed by {delay:g} ms: a step of {args.step:g} ms takes {late} more, at once {at_once}"
            )


if __name__ == "__main__":
    main()
