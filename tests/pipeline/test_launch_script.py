"""Functions of slurm/launch.sh that need no cluster, run in bash."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bash(script: str, **environment) -> subprocess.CompletedProcess:
    """Run a script after launch.sh, in an environment that holds PATH and `environment` only."""
    return subprocess.run(
        ["bash", "-c", f". {ROOT}/slurm/launch.sh; {script}"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("site", "python"),
    [
        (":", "{repository}/.venv/bin/python"),
        ("SRUN_OPTIONS=(--mpi=none)", "{repository}/.venv/bin/python"),
        ("VENV={custom}", "{custom}/bin/python"),
        ("VENV={custom} SRUN_OPTIONS=(--mpi=none --exclusive)", "{custom}/bin/python"),
        ("SRUN_OPTIONS=(--mpi=none --container-image=i.sqsh)", "python"),
        ("INSIDE=(apptainer exec i.sif)", "python"),
        ("VENV=/in/image INSIDE=(apptainer exec i.sif)", "/in/image/bin/python"),
    ],
)
def test_python_is_that_of_venv_or_of_the_container(tmp_path, site, python):
    folders = {"repository": tmp_path / "repository", "custom": tmp_path / "custom"}
    for folder in (folders["repository"] / ".venv", folders["custom"]):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to("/bin/true")
    result = bash(f"{site.format(**folders)}; find_python; echo $PYTHON", SHARDMAE=str(folders["repository"]))
    assert result.stdout.strip() == python.format(**folders), result.stderr


@pytest.mark.parametrize("site", ["VENV=/nowhere", "VENV=/nowhere SRUN_OPTIONS=(--mpi=none)"])
def test_missing_venv_is_a_one_line_error(site):
    result = bash(f"{site}; find_python")
    assert result.returncode == 2 and "/nowhere/bin/python" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_job_without_progress_is_not_requeued(tmp_path):
    """Also if the history of restarts is long."""
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-9")
    history = [f"7 step-{step}" for step in range(50_000)]
    (tmp_path / "slurm_restarts").write_text("\n".join(["7 step-9", *history, *["7 step-9"] * 2]) + "\n")
    result = bash("finish 75", SLURM_JOB_ID="7", RUN=str(tmp_path), RETRIES="2")
    assert result.returncode == 75
    assert "step-9 in 3 starts; not requeued" in result.stderr


@pytest.mark.parametrize("code", [2, 4])
def test_user_error_and_divergence_are_not_requeued(code):
    """Out of memory is a user error."""
    result = bash(f"scontrol() {{ echo requeued >&2; }}; finish {code}", RUN="/nowhere", SLURM_JOB_ID="7")
    assert result.returncode == code and "requeued" not in result.stderr


@pytest.mark.parametrize(
    ("driver", "environment", "device"),
    [
        (False, {}, "cpu"),
        (True, {"SLURM_GPUS_ON_NODE": "8"}, ""),
        (True, {"SLURM_JOB_GPUS": "0"}, ""),
        (True, {"DS_ACCELERATOR": "cpu"}, "cpu"),
        (True, {"DS_ACCELERATOR": "cuda"}, "cuda"),
        (True, {}, None),
    ],
)
def test_job_without_gpus_on_a_gpu_node_is_an_error(driver, environment, device):
    has_driver = f"has_gpu_driver() {{ {str(driver).lower()}; }}"
    result = bash(f"{has_driver}; choose_device; echo device ${{DS_ACCELERATOR:-}}", **environment)
    if device is None:
        assert result.returncode == 2 and "--gres=gpu" in result.stderr and len(result.stderr.splitlines()) == 1
    else:
        assert result.stdout.split() == ["device", *[device] * bool(device)], result.stderr


def test_ranks_fill_a_socket_after_the_other_unless_the_site_says_so():
    script = 'srun() { echo "$@"; }; SRUN_OPTIONS=(--distribution=cyclic); PYTHON=python; run_ranks preflight'
    options = [word for word in bash(script).stdout.split() if "distribution" in word]
    assert options == ["--distribution=block:block", "--distribution=cyclic"]
