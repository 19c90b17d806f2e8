"""The same run under plain Python, torchrun, and DeepSpeed's launcher with and without a hostfile.

test_slurm_jobs.py tests srun.
"""

from pytest import approx
from runs import DeepSpeedRun, HostfileRun, Run, TorchRun, launch_processes


def test_losses_do_not_depend_on_the_launcher(shards, tmp_path):
    plain = Run(shards, tmp_path / "plain")
    plain.launch = launch_processes
    one_rank = plain.train(1, train__steps=8)
    runs = [DeepSpeedRun(shards, tmp_path / "deepspeed"), TorchRun(shards, tmp_path / "torchrun")]
    runs.append(HostfileRun(shards, tmp_path / "hostfile"))
    by_deepspeed, *others = ([line["loss"] for line in run.train(2, train__steps=8)] for run in runs)
    for losses in others:
        assert losses == approx(by_deepspeed, rel=1e-6)
    assert by_deepspeed == approx([line["loss"] for line in one_rank], rel=1e-5)
