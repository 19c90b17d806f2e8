"""The templates in slurm/, unchanged, on a real Slurm cluster of two nodes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import JOB_STEPS, ROOT, Job

from data_prep.shard_set import read_manifest

TEMPLATES = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name != "launch.sh")


@pytest.mark.soak
def test_vith_trains_on_one_node_as_without_slurm(cluster, shards, tmp_path, undisturbed_losses):
    """On two nodes: test_slurm_disturbances.py."""
    job = Job(cluster, shards, tmp_path, train__steps=JOB_STEPS)
    said = job.train("pretrain_vith.sh", "--nodes=1", "--ntasks-per-node=2")
    assert "preflight: ranks     2 on n1; cpu" in said and said.rstrip().endswith("done")
    assert [step for step, _ in job.losses()] == list(range(1, JOB_STEPS + 1))
    assert job.losses() == undisturbed_losses


@pytest.mark.soak
def test_vitl_trains_on_two_nodes_as_on_one(cluster, shards, tmp_path):
    two, one = (Job(cluster, shards, tmp_path, name, train__steps=12) for name in ("two", "one"))
    two.train("pretrain_vitl.sh")
    one.train("pretrain_vitl.sh", "--nodes=1", "--ntasks-per-node=2")
    assert len(two.losses()) == 12 and two.losses() == one.losses()


@pytest.mark.soak
def test_an_encoder_is_fine_tuned_and_then_judged_by_jobs_that_wait_for_each_other(
    cluster, labelled_sets, tmp_path
):
    train, val = labelled_sets
    tuned, judged = (Job(cluster, train, tmp_path, name) for name in ("tuned", "judged"))
    sets = "data.image_size=32 data.global_batch=16 engine.micro_batch=4 train.steps=4 optim.warmup_steps=1"
    given = {"WEIGHTS": "random:demo_emae", "VAL": str(val)}
    tuned.submit("finetune_vitl.sh", **given, RECIPE="finetune_tiny", SETS=sets)
    after = f"--dependency=afterok:{tuned.id}"
    judged.submit(
        "evaluate.sh", after, **given, SETS="data.global_batch=16 engine.micro_batch=8 train.epochs=1"
    )
    assert tuned.wait()["JobState"] == "COMPLETED", tuned.said()
    accuracy = json.loads((tuned.run / "accuracy.json").read_text())
    assert accuracy["step"] == 4 and accuracy["top1"]["total"] == 42
    assert judged.wait()["JobState"] == "COMPLETED", judged.said()
    assert "top-1" in judged.said() and judged.said().rstrip().endswith("done")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_slurm_accepts_every_template(cluster, template):
    cluster.run("sbatch", "--test-only", "--nodes=2", template)


def test_shellcheck_finds_nothing():
    scripts = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / "slurm" / "site.env"]
    command = [Path(sys.executable).with_name("shellcheck"), "-x", *scripts]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("variable", "complaint"),
    [
        ({"DATA": ""}, "error: DATA is not set; give a shard set that python -m data_prep made"),
        ({"RUN": ""}, "error: RUN is not set"),
        ({"RETRIES": "some"}, "error: RETRIES=some: give a number of starts"),
        ({"METHOD": "mea"}, "error: METHOD=mea: choose one of emae efficient_mae mae lomar"),
        ({"SHARDMAE": "/nowhere"}, "error: /nowhere is not ShardMAE's repository; set SHARDMAE"),
        ({"VENV": "/nowhere"}, "/nowhere/bin/python: no Python there"),
    ],
)
def test_a_variable_that_is_missing_or_wrong_is_one_line(cluster, shards, tmp_path, variable, complaint):
    job = Job(cluster, shards, tmp_path)
    job.submit("pretrain_vitl.sh", **variable)
    ended = job.wait()
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "2:0"
    assert len(job.said().splitlines()) == 1 and complaint in job.said()


@pytest.mark.parametrize("template", ["finetune_vitl.sh", "finetune_vith.sh", "evaluate.sh"])
@pytest.mark.parametrize("missing", ["WEIGHTS", "DATA", "VAL", "RUN"])
def test_every_variable_of_a_template_is_asked_for(template, missing):
    given = {name: "" if name == missing else "given" for name in ("WEIGHTS", "DATA", "VAL", "RUN")}
    environment = {"PATH": os.environ["PATH"], "SHARDMAE": str(ROOT), **given}
    asked = subprocess.run(
        ["bash", ROOT / "slurm" / template], env=environment, capture_output=True, text=True
    )
    assert asked.returncode == 2 and len(asked.stderr.splitlines()) == 1
    assert f"error: {missing} is not set; give " in asked.stderr


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"DATA": "/nowhere"}, "/nowhere"),
        pytest.param({"RECIPE": "vitl16_meae"}, "recipe 'vitl16_meae': neither", marks=pytest.mark.soak),
    ],
    ids=["data", "recipe"],
)
def test_what_the_pre_flight_finds_is_one_line_with_the_nodes_and_the_job_stays_down(
    cluster, shards, tmp_path, wrong, complaint
):
    job = Job(cluster, shards, tmp_path)
    job.submit("pretrain_vitl.sh", **wrong)
    ended = job.wait()
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "2:0" and ended["Restarts"] == "0"
    errors = [line for line in job.said().splitlines() if "pipeline: error" in line]
    assert len(errors) == 1 and "n1, n2: " in errors[0] and complaint in errors[0]
    assert not job.run.exists()


def test_an_array_build_with_a_task_that_fails_first_is_a_local_build(cluster, shards, photographs, tmp_path):
    out, here = tmp_path / "out", tmp_path / "here"
    environment = Job(cluster, shards, tmp_path).environment
    options = "--shard-size 20 --seed 3"
    source = {"SOURCE": "folder", "SRC": str(photographs), "OUT": str(out), "OPTIONS": options}

    command = [sys.executable, "-m", "data_prep", "folder", photographs, here, *options.split()]
    subprocess.run(command, check=True, capture_output=True)
    manifest = read_manifest(here)

    def submit(array, **more):
        place = (f"--chdir={tmp_path}", f"--output={tmp_path}/%x-%A.%a.out", "--cpus-per-task=1")
        script = ROOT / "slurm" / "build_shards.sh"
        return cluster.submit(f"--array={array}", *place, script, **environment | source | more)

    def finalized(job):
        """What the last step says, which the first task of the array submits."""
        cluster.wait_for_all(120)
        (output,) = tmp_path.glob(f"finalize-shards-{job}-*.out")
        return output.read_text()

    first = submit("0-3")
    kill(cluster, "--task-index\0002")
    missing = [shard.name for shard in manifest.shards[2::4]]
    assert f"{len(missing)} of {len(manifest.shards)} shards are not built yet ({missing[0]}" in finalized(
        first
    )
    assert not (out / "manifest.json").exists()
    # Put back before it submitted the last step, a task starts with this count.
    again = submit("2", TASKS="4", SLURM_RESTART_COUNT="1")
    assert f"{out}: {manifest.num_samples} samples in {len(manifest.shards)} shards" in finalized(again)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in here.iterdir()}


def kill(cluster, words):
    """SIGKILL what runs with these words in its command line, as soon as it does."""
    deadline = time.monotonic() + 60
    while not (found := [*cluster.processes("n1", words), *cluster.processes("n2", words)]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.name), signal.SIGKILL)
