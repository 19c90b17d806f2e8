"""The same run under every launcher: plain Python, DeepSpeed's, also by a hostfile, and torch's (srun's:
test_slurm_jobs.py)."""

from pytest import approx
from runs import DeepSpeedRun, HostfileRun, Run, TorchRun, launch_processes


def test_plain_python_torchrun_and_deepspeed_give_the_same_losses(shards, tmp_path):
    plain = Run(shards, tmp_path / "alone")
    plain.launch = launch_processes
    alone = plain.train(1, train__steps=8)
    runs = [DeepSpeedRun(shards, tmp_path / "deepspeed"), TorchRun(shards, tmp_path / "torchrun")]
    runs.append(HostfileRun(shards, tmp_path / "hostfile"))
    by_deepspeed, *others = ([line["loss"] for line in run.train(2, train__steps=8)] for run in runs)
    for losses in others:
        assert losses == approx(by_deepspeed, rel=1e-6)
    assert by_deepspeed == approx([line["loss"] for line in alone], rel=1e-5)
