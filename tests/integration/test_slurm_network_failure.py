"""A job whose nodes lose their connection ends by itself, and resumes when the connection is restored."""

import time

from cluster import Cluster, Network
from jobs import JOB_STEPS, Job, require_slurm, wait_for_steps, wait_until


def test_cut_link_ends_all_ranks_and_the_job_resumes(shards, tmp_path, uninterrupted_losses):
    require_slurm()
    network = Network()
    try:
        cluster = Cluster(tmp_path / "cluster", network, slurmd_timeout=300)  # Slurm itself ends nothing
        try:
            settings = {"engine__timeout_minutes": 0.5, "data__timeout_s": 10, "data__retries": 0}
            settings["train__checkpoint_every"] = 100  # while one is written the timeout is longer
            job = Job(cluster, shards, tmp_path, train__steps=JOB_STEPS, **settings)
            job.submit("pretrain_vith.sh", "--time=60")
            wait_for_steps(job, 1)
            processes = cluster.processes("n1", "pretrain") + cluster.processes("n2", "pretrain")
            ranks = [process for process in processes if (process / "comm").read_text() != "srun\n"]
            assert len(ranks) == 2
            wait_for_steps(job, 5)
            network.set_link("n2", connected=False)
            cut = time.monotonic()
            wait_until(lambda: not any(rank.exists() for rank in ranks), 90, job)
            assert time.monotonic() - cut < 60
            for rank in (0, 1):
                stacks = (job.run / "stacks" / f"rank-{rank}.txt").read_text()
                assert "Thread" in stacks and "train_loop.py" in stacks
            assert " ERROR rank " in job.log() and "no progress for " in job.log()
            network.set_link("n2", connected=True)
            assert job.wait()["JobState"] == "COMPLETED"
            assert job.losses() == uninterrupted_losses
        finally:
            cluster.close()
    finally:
        network.close()
