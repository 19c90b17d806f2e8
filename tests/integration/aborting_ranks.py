"""One rank of four announces an error while the others wait for it in a collective.

`python -m aborting_ranks RANK`
"""

import sys
import time
from contextlib import closing

import torch
import torch.distributed as dist

from pipeline.distributed.abort import POLL_S, AbortChannel
from pipeline.distributed.collectives import init_distributed


def main() -> None:
    with init_distributed(1.0) as dist_info:
        dist.barrier()
        # The ranks look for an error at different times.
        time.sleep(POLL_S * dist_info.rank / dist_info.world_size)
        with closing(AbortChannel(dist_info)) as channel:
            if dist_info.rank == int(sys.argv[1]):
                channel.announce("out of memory")
            dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main()
