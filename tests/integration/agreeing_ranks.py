"""Check on two ranks what ranks agree on without waiting for each other. Fails by an assertion.

`python -m agreeing_ranks`, with two ranks.
"""

import itertools
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.distributed import collectives
from pipeline.distributed.collectives import all_gather_uneven, init_distributed
from pipeline.train.preemption import DATA_ERROR, PreemptionHandler


class Counter:
    """A loader of 0, 1, 2, ..., which fails at one of them on one rank."""

    def __init__(self, fail_at: int | None = None):
        self.numbers, self.fail_at = itertools.count(), fail_at

    def next(self) -> int:
        number = next(self.numbers)
        if number == self.fail_at:
            raise RuntimeError("no more data")
        return number


def check_gather(rank: int) -> None:
    """Rows of both ranks, in pieces of three rows."""
    row = torch.arange(4)
    collectives.PIECE_BYTES = 3 * row.nbytes
    for counts in ((7, 2), (0, 4), (5, 5), (0, 0)):
        rows = row + torch.arange(sum(counts))[:, None]
        first = sum(counts[:rank])
        assert torch.equal(all_gather_uneven(rows[first : first + counts[rank]]), rows), counts


def check_overlap(rank: int, store: dist.Store) -> None:
    """Rank 0 gets each micro batch before rank 1 joins the agreement that starts with it."""
    handler, loader = PreemptionHandler(), Counter()
    handler.connect(1.0)
    assert handler.next_batch(loader) == 0
    for number in range(1, 4):
        if rank == 1:
            store.wait([f"rank 0 has {number}"], timedelta(seconds=30))  # an agreement that blocks never gets there
        assert handler.next_batch(loader) == number
        if rank == 0:
            store.set(f"rank 0 has {number}", "")
    handler.discard_ahead()


def check_failure(rank: int) -> None:
    """A rank that cannot load a micro batch stops both before either trains it."""
    handler, loader = PreemptionHandler(), Counter(fail_at=2 if rank == 1 else None)
    handler.connect(1.0)
    assert [handler.next_batch(loader) for _ in range(3)] == [0, 1, None]
    assert handler.stop_reason == DATA_ERROR
    # What was loaded ahead for a loader that is replaced does not matter, even if it failed.
    handler, loader = PreemptionHandler(), Counter(fail_at=1 if rank == 1 else None)
    handler.connect(1.0)
    assert handler.next_batch(loader) == 0
    assert handler.next_batch(Counter()) == 0 and not handler.stop_reason
    handler.discard_ahead()


def main() -> None:
    with init_distributed(1.0) as dist_info:
        check_gather(dist_info.rank)
        check_failure(dist_info.rank)
        check_overlap(dist_info.rank, dist.distributed_c10d._get_default_store())
        print("agreed")


if __name__ == "__main__":
    main()
