"""A job whose nodes cannot reach each other ends by itself and continues when they can."""

import time

from cluster import Cluster, Network
from jobs import JOB_STEPS, Job, needs_slurm, train_on, until


def test_a_cut_link_ends_all_ranks_by_themselves_and_the_job_continues_when_it_is_back(
    shards, tmp_path, undisturbed_losses
):
    needs_slurm()
    network = Network()
    try:
        cluster = Cluster(tmp_path / "cluster", network, silence=300)  # Slurm ends nothing here
        try:
            short = {"engine__timeout_minutes": 0.5, "data__timeout_s": 10, "data__retries": 0}
            short["train__checkpoint_every"] = 100  # one that is being written would be waited for longer
            job = Job(cluster, shards, tmp_path, train__steps=JOB_STEPS, **short)
            job.submit("pretrain_vith.sh", "--time=60")
            train_on(job, 1)
            found = cluster.processes("n1", "pretrain") + cluster.processes("n2", "pretrain")
            ranks = [process for process in found if (process / "comm").read_text() != "srun\n"]
            assert len(ranks) == 2
            train_on(job, 5)
            network.plug("n2", connected=False)
            cut = time.monotonic()
            until(lambda: not any(rank.exists() for rank in ranks), 90, job)
            assert time.monotonic() - cut < 60
            for rank in (0, 1):
                stacks = (job.run / "stacks" / f"rank-{rank}.txt").read_text()
                assert "Thread" in stacks and "loop.py" in stacks
            assert "some rank hangs" in job.said()
            network.plug("n2", connected=True)
            assert job.wait()["JobState"] == "COMPLETED"
            assert job.losses() == undisturbed_losses
        finally:
            cluster.close()
    finally:
        network.close()
