"""The unchanged templates of slurm/, on a real Slurm cluster of two nodes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import JOB_STEPS, ROOT, Job

from data_prep.shard_set import read_manifest

TEMPLATES = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name != "launch.sh")


@pytest.mark.soak
def test_vith_on_one_node_trains_as_without_slurm(cluster, shards, tmp_path, uninterrupted_losses):
    """test_slurm_interruptions.py uses two nodes."""
    job = Job(cluster, shards, tmp_path, train__steps=JOB_STEPS)
    log = job.train("pretrain_vith.sh", "--nodes=1", "--ntasks-per-node=2")
    assert "preflight: ranks     2 on n1; cpu" in log and log.rstrip().endswith("done")
    assert [step for step, _ in job.losses()] == list(range(1, JOB_STEPS + 1))
    assert job.losses() == uninterrupted_losses


@pytest.mark.soak
def test_vitl_trains_on_two_nodes_as_on_one(cluster, shards, tmp_path):
    two, one = (Job(cluster, shards, tmp_path, name, train__steps=12) for name in ("two", "one"))
    two.train("pretrain_vitl.sh")
    one.train("pretrain_vitl.sh", "--nodes=1", "--ntasks-per-node=2")
    assert len(two.losses()) == 12 and two.losses() == one.losses()


@pytest.mark.soak
def test_dependent_jobs_fine_tune_and_evaluate(cluster, labelled_sets, tmp_path):
    train, val = labelled_sets
    tuning, evaluation = (Job(cluster, train, tmp_path, name) for name in ("tuning", "evaluation"))
    sets = "data.image_size=32 data.global_batch=16 engine.micro_batch=4 train.steps=4 optim.warmup_steps=1"
    variables = {"WEIGHTS": "random:demo_emae", "VAL": str(val)}
    tuning.submit("finetune_vitl.sh", **variables, RECIPE="finetune_tiny", SETS=sets)
    after = f"--dependency=afterok:{tuning.id}"
    sets = "data.global_batch=16 engine.micro_batch=8 train.epochs=1"
    evaluation.submit("evaluate.sh", after, **variables, SETS=sets)
    assert tuning.wait()["JobState"] == "COMPLETED", tuning.log()
    accuracy = json.loads((tuning.run / "results.json").read_text())
    assert accuracy["step"] == 4 and accuracy["top1"]["total"] == 42
    assert evaluation.wait()["JobState"] == "COMPLETED", evaluation.log()
    assert "top-1" in evaluation.log() and evaluation.log().rstrip().endswith("done")


@pytest.mark.soak
def test_job_out_of_memory_on_one_rank_is_not_requeued(cluster, shards, tmp_path):
    """The job's Python trains with a method that is out of memory on rank 1."""
    faults = json.dumps([{"kind": "out of memory", "rank": 1, "steps": [6]}])
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/bash
        [ "$3" = pretrain ] || exec {sys.executable} "$@"
        exec {sys.executable} -m faulty '{faults}' "${{@:5}}"
        """
    )
    python.chmod(0o755)
    job = Job(cluster, shards, tmp_path, train__steps=JOB_STEPS)
    job.submit("pretrain_vith.sh", VENV=str(python.parents[1]), PYTHONPATH=str(Path(__file__).parent))
    ended = job.wait()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), job.log()
    assert "engine.micro_batch: 4 needs more memory than the GPU of rank 1" in job.log()
    assert "stopped with exit code 2" in job.log() and "Traceback" not in job.log()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_slurm_accepts_every_template(cluster, template):
    cluster.run("sbatch", "--test-only", "--nodes=2", template)


def test_shellcheck_passes():
    scripts = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / "slurm" / "site.env"]
    command = [Path(sys.executable).with_name("shellcheck"), "-x", *scripts]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ({"DATA": ""}, "error: DATA is not set"),
        ({"RUN": ""}, "error: RUN is not set"),
        ({"RETRIES": "some"}, "error: RETRIES=some: "),
        ({"METHOD": "mea"}, "error: METHOD=mea: choose one of emae efficient_mae mae lomar"),
        ({"SHARDMAE": "/nowhere"}, "error: /nowhere "),
        ({"VENV": "/nowhere"}, "/nowhere/bin/python: "),
    ],
)
def test_wrong_variable_is_one_error_line(cluster, shards, tmp_path, variable, message):
    job = Job(cluster, shards, tmp_path)
    job.submit("pretrain_vitl.sh", **variable)
    ended = job.wait()
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "2:0"
    assert len(job.log().splitlines()) == 1 and message in job.log()


@pytest.mark.parametrize("template", ["finetune_vitl.sh", "finetune_vith.sh", "evaluate.sh"])
@pytest.mark.parametrize("missing", ["WEIGHTS", "DATA", "VAL", "RUN"])
def test_every_variable_of_a_template_is_required(template, missing):
    variables = {name: "" if name == missing else "given" for name in ("WEIGHTS", "DATA", "VAL", "RUN")}
    environment = {"PATH": os.environ["PATH"], "SHARDMAE": str(ROOT), **variables}
    command = ["bash", ROOT / "slurm" / template]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 2 and len(finished.stderr.splitlines()) == 1
    assert f"error: {missing} is not set" in finished.stderr


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ({"DATA": "/nowhere"}, "/nowhere"),
        pytest.param({"RECIPE": "vitl16_meae"}, "recipe 'vitl16_meae': ", marks=pytest.mark.soak),
    ],
    ids=["data", "recipe"],
)
def test_preflight_error_names_nodes_and_ends_the_job(cluster, shards, tmp_path, variable, message):
    job = Job(cluster, shards, tmp_path)
    job.submit("pretrain_vitl.sh", **variable)
    ended = job.wait()
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "2:0" and ended["Restarts"] == "0"
    errors = [line for line in job.log().splitlines() if "pipeline: error" in line]
    assert len(errors) == 1 and "n1, n2: " in errors[0] and message in errors[0]
    assert not job.run.exists()


def test_array_build_with_a_failed_task_equals_a_local_build(cluster, shards, photographs, tmp_path):
    """The tasks of a build from parquet also share its staged images; those of `adopt` share nothing but a folder."""
    out, local, parquet = tmp_path / "out", tmp_path / "local", tmp_path / "train.parquet"
    images = [path.read_bytes() for path in sorted(photographs.rglob("*.*"))]
    pq.write_table(pa.table({"image": [{"bytes": image, "path": None} for image in images]}), parquet)
    environment = Job(cluster, shards, tmp_path).environment
    options = "--shard-size 20 --seed 3"
    source = {"SOURCE": "parquet", "SRC": str(parquet), "OUT": str(out), "OPTIONS": options}

    command = [sys.executable, "-m", "data_prep", "parquet", parquet, local, *options.split()]
    subprocess.run(command, check=True, capture_output=True)
    manifest = read_manifest(local)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for folder in (alone, shared):
        folder.mkdir()
        for path in local.glob("*.tar"):
            shutil.copy(path, folder)
    subprocess.run([*command[:3], "adopt", alone], check=True, capture_output=True)

    def submit(array, **more):
        folder = (f"--chdir={tmp_path}", f"--output={tmp_path}/%x-%A.%a.out", "--cpus-per-task=1")
        script = ROOT / "slurm" / "build_shards.sh"
        return cluster.submit(f"--array={array}", *folder, script, **environment | source | more)

    def finalize_log(job):
        """Wait for all jobs. Returns the log of the last step, which the array's first task submits."""
        cluster.wait_for_all(120)
        (output,) = tmp_path.glob(f"finalize-shards-{job}-*.out")
        return output.read_text()

    submit("0-1", SOURCE="adopt", OUT=str(shared), OPTIONS="")
    first = submit("0-3")
    kill(cluster, "--task-index\0002")
    missing = [shard.name for shard in manifest.shards[2::4]]
    log = finalize_log(first)
    assert f"{len(missing)} of {len(manifest.shards)} shards" in log and missing[0] in log
    assert not (out / "manifest.json").exists()
    assert content(shared) == content(alone)
    # With this count, a task submits the last step as if it had been requeued before it could.
    second = submit("2", TASKS="4", SLURM_RESTART_COUNT="1")
    log = finalize_log(second)
    assert f"{out}: {manifest.num_samples} samples in {len(manifest.shards)} shards" in log
    assert content(out) == content(local)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill(cluster, words):
    """Kill the processes with these words in their command line, as soon as there are some."""
    deadline = time.monotonic() + 60
    while not (processes := [*cluster.processes("n1", words), *cluster.processes("n2", words)]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.name), signal.SIGKILL)
