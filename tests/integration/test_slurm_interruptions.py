"""A job that is disturbed comes back by itself, and its losses are those of a job that was left in peace."""

import os
import random

import pytest
from jobs import JOB_STEPS, Job, train_on, until

TEMPLATE = "pretrain_vith.sh"


def has_left(job):
    return job.cluster.job(job.id)["JobState"] != "RUNNING"


def requeue(job):
    job.cluster.run("scontrol", "requeue", job.id)


def signal(job):
    job.cluster.run("scancel", "--signal=USR1", job.id)


def time_limit(job):
    """The time limit is near: Slurm signals, as the template asks it to."""
    job.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=2")
    until(lambda: has_left(job), 90, job)
    job.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")


def lost_node(job):
    job.cluster.kill_node("n2")
    until(lambda: has_left(job), 90, job)
    job.cluster.start_node("n2")


def drained_node(job):
    job.cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=maintenance")
    requeue(job)
    until(lambda: has_left(job), 90, job)
    job.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")


DISTURBANCES = [requeue, signal, time_limit, lost_node, drained_node]


def disturbed(cluster, shards, place, steps, disturbances, chance) -> Job:
    job = Job(cluster, shards, place, train__steps=steps)
    job.submit(TEMPLATE, "--time=60")
    for disturb in disturbances:
        train_on(job, chance.randrange(5, 30))
        restarts = int(cluster.job(job.id)["Restarts"])
        disturb(job)
        until(lambda before=restarts: int(cluster.job(job.id)["Restarts"]) > before, 90, job)
    ended = job.wait()
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) == len(disturbances), job.said()
    return job


def test_a_job_that_is_signalled_and_loses_a_node_continues_by_itself(
    cluster, shards, tmp_path, undisturbed_losses
):
    job = disturbed(cluster, shards, tmp_path, JOB_STEPS, [signal, lost_node], random.Random(0))
    assert job.losses() == undisturbed_losses
    assert "preflight: ranks     2 on n1, n2; cpu" in job.said() and job.said().rstrip().endswith("done")
    assert "exit code 75 at checkpoint step-" in job.said()


@pytest.mark.soak
def test_ten_random_disturbances(cluster, shards, tmp_path):
    seed = int(os.environ.get("DISTURBANCES", random.randrange(10**6)))
    print(f"DISTURBANCES={seed} repeats these")
    chance = random.Random(seed)
    order = 2 * DISTURBANCES
    chance.shuffle(order)
    steps = 1500  # Slurm looks at time limits every half minute, and the job goes on until then
    undisturbed = Job(cluster, shards, tmp_path, "undisturbed", train__steps=steps)
    undisturbed.train(TEMPLATE)
    assert disturbed(cluster, shards, tmp_path, steps, order, chance).losses() == undisturbed.losses()


@pytest.mark.soak
def test_a_time_limit_that_comes_without_a_notice_costs_nothing_either(cluster, shards, tmp_path):
    """Slurm ends the job with SIGTERM at its limit; the same command, submitted again, goes on."""
    job = Job(cluster, shards, tmp_path, train__steps=100_000)
    job.submit(TEMPLATE, "--time=60", "--signal=CONT@1")
    train_on(job, 10)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=1")
    assert job.wait()["JobState"] == "TIMEOUT"
    saved = len(job.losses())
    assert (job.run / "checkpoints" / f"step-{saved:08d}").exists(), job.said()[-4000:]
    job = Job(cluster, shards, tmp_path, train__steps=saved + 5)
    assert f"continued after step {saved}" in job.train(TEMPLATE)
    assert [step for step, _ in job.losses()] == list(range(1, saved + 6))
