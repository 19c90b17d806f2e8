"""An interrupted job is requeued and resumes by itself, with the losses of an uninterrupted job."""

import os
import random
import time

import pytest
from cluster import Cluster, Network
from jobs import JOB_STEPS, Job, require_slurm, wait_for_steps, wait_until

TEMPLATE = "pretrain_vith.sh"


def has_stopped(job):
    return job.cluster.job(job.id)["JobState"] != "RUNNING"


def requeue(job):
    job.cluster.run("scontrol", "requeue", job.id)


def signal(job):
    job.cluster.run("scancel", "--signal=USR1", job.id)


def time_limit(job):
    """Let the time limit come near: Slurm then sends the signal that the template asks for."""
    job.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=2")
    wait_until(lambda: has_stopped(job), 90, job)
    job.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")


def node_failure(job):
    job.cluster.kill_node("n2")
    wait_until(lambda: has_stopped(job), 90, job)
    job.cluster.start_node("n2")


def drained_node(job):
    job.cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=maintenance")
    requeue(job)
    wait_until(lambda: has_stopped(job), 90, job)
    job.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")


INTERRUPTIONS = [requeue, signal, time_limit, node_failure, drained_node]


def train_interrupted(cluster, shards, folder, steps, interruptions, rng) -> Job:
    job = Job(cluster, shards, folder, train__steps=steps)
    job.submit(TEMPLATE, "--time=60")
    for interrupt in interruptions:
        wait_for_steps(job, rng.randrange(5, 30))
        restarts = int(cluster.job(job.id)["Restarts"])
        interrupt(job)
        wait_until(lambda before=restarts: int(cluster.job(job.id)["Restarts"]) > before, 90, job)
    ended = job.wait()
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) == len(interruptions), job.log()
    return job


def test_signaled_job_is_requeued_and_resumes(cluster, shards, tmp_path, uninterrupted_losses):
    job = train_interrupted(cluster, shards, tmp_path, JOB_STEPS, [signal], random.Random(0))
    assert job.losses() == uninterrupted_losses
    assert "preflight: ranks     2 on n1, n2; cpu" in job.log() and job.log().rstrip().endswith("done")
    assert "exit code 75 at checkpoint step-" in job.log()


@pytest.mark.soak
def test_job_resumes_after_a_node_failure_and_a_cut_link(shards, tmp_path, uninterrupted_losses):
    """test_lost_ranks.py has a hanging rank without Slurm."""
    require_slurm()
    network = Network()
    try:
        cluster = Cluster(tmp_path / "cluster", network, slurmd_timeout=300)  # Slurm does not end the job for the link
        try:
            settings = {"engine__timeout_minutes": 0.5, "data__timeout_s": 10, "data__retries": 0}
            settings["train__checkpoint_every"] = JOB_STEPS  # while one is written the timeout is longer
            job = Job(cluster, shards, tmp_path, train__steps=JOB_STEPS, **settings)
            job.submit(TEMPLATE, "--time=60")
            for number, interrupt in enumerate([signal, marked_node_failure, cut_link]):
                wait_for_steps(job, 10)
                interrupt(job)
                wait_until(lambda before=number: int(cluster.job(job.id)["Restarts"]) > before, 90, job)
            ended = job.wait()
            assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) == 3, job.log()
            assert job.losses() == uninterrupted_losses
        finally:
            cluster.close()
    finally:
        network.close()


def marked_node_failure(job):
    """Lose a node, and mark it as Slurm does when the node's timeout has passed."""
    job.cluster.kill_node("n2")
    job.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    wait_until(lambda: has_stopped(job), 90, job)
    job.cluster.start_node("n2")


def cut_link(job):
    """Disconnect a node until all ranks have ended by themselves."""
    processes = job.cluster.processes("n1", "pretrain") + job.cluster.processes("n2", "pretrain")
    ranks = [process for process in processes if (process / "comm").read_text() != "srun\n"]
    assert len(ranks) == 2
    logged = len(job.log())
    job.cluster.network.set_link("n2", connected=False)
    cut, cut_at = time.monotonic(), time.time()
    wait_until(lambda: not any(rank.exists() for rank in ranks), 90, job)
    assert time.monotonic() - cut < 60
    for rank in (0, 1):
        stacks = job.run / "stacks" / f"rank-{rank}.txt"
        assert stacks.stat().st_mtime > cut_at
        assert "Thread" in stacks.read_text() and "train_loop.py" in stacks.read_text()
    log = job.log()[logged:]
    assert " ERROR rank " in log and "no progress for " in log
    job.cluster.network.set_link("n2", connected=True)


@pytest.mark.soak
def test_ten_random_interruptions(cluster, shards, tmp_path):
    seed = int(os.environ.get("INTERRUPTION_SEED", random.randrange(10**6)))
    print(f"INTERRUPTION_SEED={seed} repeats these interruptions")
    rng = random.Random(seed)
    order = 2 * INTERRUPTIONS
    rng.shuffle(order)
    steps = 1500  # Slurm checks time limits every 30 s, during which the job continues
    uninterrupted = Job(cluster, shards, tmp_path, "uninterrupted", train__steps=steps)
    uninterrupted.train(TEMPLATE)
    assert train_interrupted(cluster, shards, tmp_path, steps, order, rng).losses() == uninterrupted.losses()


@pytest.mark.soak
def test_time_limit_without_notice_loses_nothing(cluster, shards, tmp_path):
    """Slurm ends the job with SIGTERM at its limit; the same command, submitted again, resumes it."""
    job = Job(cluster, shards, tmp_path, train__steps=100_000)
    job.submit(TEMPLATE, "--time=60", "--signal=CONT@1")
    wait_for_steps(job, 10)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=1")
    assert job.wait()["JobState"] == "TIMEOUT"
    saved = len(job.losses())
    assert (job.run / "checkpoints" / f"step-{saved:08d}").exists(), job.log()[-4000:]
    job = Job(cluster, shards, tmp_path, train__steps=saved + 5)
    assert f"resumed after step {saved}" in job.train(TEMPLATE)
    assert [step for step, _ in job.losses()] == list(range(1, saved + 6))
