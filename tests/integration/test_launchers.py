"""The same run under torchrun, and under DeepSpeed's launcher with a hostfile, as without a launcher.

test_preemption.py compares interrupted runs under torchrun and DeepSpeed's launcher, test_slurm_interruptions.py under
srun, with runs without a launcher.
"""

import pytest
from runs import HostfileRun, Run, TorchRun


@pytest.mark.soak
@pytest.mark.parametrize("kind", [TorchRun, HostfileRun])
def test_losses_do_not_depend_on_the_launcher(shards, tmp_path, kind):
    plain, launched = (
        run.train(2, train__steps=8) for run in (Run(shards, tmp_path / "plain"), kind(shards, tmp_path / "run"))
    )
    assert [line["loss"] for line in launched] == [line["loss"] for line in plain]
