"""What slurm/launch.sh decides by itself, in bash, without a cluster."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bash(script: str, **environment) -> subprocess.CompletedProcess:
    """Runs the script after launch.sh, whose settings it has."""
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
        ("VENV={mine}", "{mine}/bin/python"),
        ("VENV={mine} SRUN_OPTIONS=(--mpi=none --exclusive)", "{mine}/bin/python"),
        ("SRUN_OPTIONS=(--mpi=none --container-image=i.sqsh)", "python"),
        ("INSIDE=(apptainer exec i.sif)", "python"),
        ("VENV=/in/image INSIDE=(apptainer exec i.sif)", "/in/image/bin/python"),
    ],
)
def test_pythons_environment_is_venvs_and_an_images_only_in_a_container(tmp_path, site, python):
    places = {"repository": tmp_path / "repository", "mine": tmp_path / "mine"}
    for folder in (places["repository"] / ".venv", places["mine"]):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to("/bin/true")
    ended = bash(f"{site.format(**places)}; interpreter; echo $PYTHON", SHARDMAE=str(places["repository"]))
    assert ended.stdout.strip() == python.format(**places), ended.stderr


@pytest.mark.parametrize("site", ["VENV=/nowhere", "VENV=/nowhere SRUN_OPTIONS=(--mpi=none)"])
def test_an_environment_that_is_not_there_is_one_line(site):
    ended = bash(f"{site}; interpreter")
    assert ended.returncode == 2 and "/nowhere/bin/python: no Python there" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_job_stays_down_after_so_many_starts_at_one_checkpoint_however_long_its_history(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-9")
    earlier = [f"7 step-{step}" for step in range(50_000)]
    (tmp_path / "slurm_restarts").write_text("\n".join(["7 step-9", *earlier, *["7 step-9"] * 2]) + "\n")
    ended = bash("finish 75", SLURM_JOB_ID="7", RUN=str(tmp_path), RETRIES="2")
    assert ended.returncode == 75
    assert "no progress after step-9 in 3 starts; not putting the job back" in ended.stderr
