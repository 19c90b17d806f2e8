"""GPUs by torch's device name, and settings of torch."""

import subprocess

import forkserver
import pytest
import torch

from pipeline.distributed.hardware import GPUS, disable_tf32, find_gpu

NAMES = {
    "Tesla V100-SXM2-32GB": "v100",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA A800-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H800": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA H20": "h20",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000ada",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}
UNKNOWN = ["Tesla V100-PCIE-32GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D"]


@pytest.mark.parametrize(("device_name", "name"), [*NAMES.items(), *((device, None) for device in UNKNOWN)])
def test_a_device_has_the_figures_of_its_variant(device_name, name):
    assert find_gpu(device_name) is (name and GPUS[name])


def test_every_listed_gpu_has_a_device_name():
    assert set(NAMES.values()) == GPUS.keys()


def test_fp32_is_not_tf32():
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    try:
        matmul.allow_tf32 = convolution.allow_tf32 = True
        disable_tf32()
        assert not matmul.allow_tf32 and not convolution.allow_tf32
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


@pytest.mark.parametrize(("environment", "threads"), [({"SLURM_CPUS_PER_TASK": "3"}, 3), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_a_rank_uses_its_share_of_the_cores(environment, threads):
    code = (
        "import os, torch; from pipeline.distributed.launch import init_dist_env\n"
        "if 'OMP_NUM_THREADS' in os.environ: torch.set_num_threads(2)\n"
        "print(init_dist_env().num_cpus, torch.get_num_threads())"
    )
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    slurm |= {"SLURM_CPUS_PER_TASK": "3", "MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": "7", "DS_ACCELERATOR": "cpu"}
    done = forkserver.run(["-c", code], env=slurm | environment)
    assert isinstance(done, subprocess.CompletedProcess) and done.stdout.split() == ["3", str(threads)], done.stderr
