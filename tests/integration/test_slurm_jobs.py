"""The templates in slurm/, unchanged, on a real Slurm cluster of two nodes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from runs import SMALL

from data_prep.shard_set import read_manifest

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name != "launch.sh")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
TINY = {**SMALL, "model.name": "vit_tiny", "model.patch_size": 8, "model.heads": 4, "model.decoder_heads": 4}
TINY |= {"model.decoder_depth": 1, "engine.precision": "fp32", "train.steps": 12, "optim.warmup_steps": 4}
ON_TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    needs_slurm()
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.close()


@pytest.fixture
def environment(shards, tmp_path):
    """What a user sets before sbatch: data, run directory, and a model that trains in seconds."""
    return {
        "SHARDMAE": str(ROOT),
        "VENV": sys.prefix,
        "DATA": str(shards),
        "RUN": str(tmp_path / "run"),
        "SETS": " ".join(f"{key}={value}" for key, value in TINY.items()).replace(", ", ","),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": os.environ.get(
            "TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions")
        ),
    }


def needs_slurm():
    """Skip where Slurm is not installed, but never where it has to be: .ci/run says so."""
    missing = [program for program in ("slurmctld", "munged", "ip") if not shutil.which(program, path=PATH)]
    if missing and "REQUIRE_SLURM" in os.environ:
        pytest.fail(f"{', '.join(missing)} not found: install slurm-wlm, munge and iproute2")
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: the packages slurm-wlm, munge and iproute2 have them")


def losses(run: Path | str) -> list[tuple[int, float]]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def train(cluster, template, environment, output, *options, seconds=240):
    job = cluster.submit(f"--output={output}", *ON_TWO_NODES, *options, template, **environment)
    ended = cluster.wait(job, seconds, output)
    return ended, output.read_text()


@pytest.mark.parametrize("template", ["pretrain_vitl.sh", "pretrain_vith.sh"])
def test_a_template_trains_on_two_nodes_as_on_one(cluster, environment, tmp_path, template):
    ended, said = train(cluster, ROOT / "slurm" / template, environment, tmp_path / "two.out")
    assert ended["JobState"] == "COMPLETED", said
    assert "preflight: ranks     2 on n1, n2; cpu" in said and said.rstrip().endswith("done")
    two = losses(environment["RUN"])
    environment |= {"RUN": str(tmp_path / "one")}
    one_node = ("--nodes=1", "--ntasks-per-node=2")
    ended, said = train(cluster, ROOT / "slurm" / template, environment, tmp_path / "one.out", *one_node)
    assert ended["JobState"] == "COMPLETED", said
    assert [step for step, _ in two] == list(range(1, 13))
    assert two == losses(environment["RUN"])


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_slurm_accepts_every_template(cluster, template):
    cluster.run("sbatch", "--test-only", "--nodes=2", template)


def test_shellcheck_finds_nothing():
    scripts = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / "slurm" / "site.env"]
    checked = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", *scripts],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("variable", "complaint"),
    [
        ({"DATA": ""}, "error: DATA is not set; give a shard set that python -m data_prep made"),
        ({"RUN": ""}, "error: RUN is not set"),
        ({"METHOD": "mea"}, "error: METHOD=mea: choose one of emae efficient_mae mae lomar"),
        ({"SHARDMAE": "/nowhere"}, "error: /nowhere is not ShardMAE's repository; set SHARDMAE"),
        ({"VENV": "/nowhere"}, "/nowhere/bin/python: no Python there"),
    ],
)
def test_a_variable_that_is_missing_or_wrong_is_one_line(cluster, environment, tmp_path, variable, complaint):
    output = tmp_path / "output"
    ended, said = train(cluster, ROOT / "slurm/pretrain_vitl.sh", environment | variable, output)
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "2:0"
    assert len(said.splitlines()) == 1 and complaint in said


def test_an_array_build_with_a_task_missing_at_first_is_a_local_build(
    cluster, environment, photographs, tmp_path
):
    out, here = tmp_path / "out", tmp_path / "here"
    options = "--shard-size 20 --seed 3"
    source = {"SOURCE": "folder", "SRC": str(photographs), "OUT": str(out), "OPTIONS": options, "TASKS": "4"}

    command = [sys.executable, "-m", "data_prep", "folder", photographs, here, *options.split()]
    subprocess.run(command, check=True, capture_output=True)
    manifest = read_manifest(here)

    def build(array):
        """Submit the array's tasks; what the last step, which the first task submits, says in the end."""
        place = (f"--chdir={tmp_path}", f"--output={tmp_path}/%x-%A.%a.out", "--cpus-per-task=1")
        cluster.submit(f"--array={array}", *place, ROOT / "slurm/build_shards.sh", **environment, **source)
        cluster.wait_for_all(120)
        newest = max(tmp_path.glob("finalize-shards-*.out"), key=lambda path: path.stat().st_mtime)
        return newest.read_text()

    missing = [shard.name for shard in manifest.shards[2::4]]
    assert f"{len(missing)} of {len(manifest.shards)} shards are not built yet ({missing[0]}" in build(
        "0,1,3"
    )
    assert not (out / "manifest.json").exists()
    assert f"{out}: {manifest.num_samples} samples in {len(manifest.shards)} shards" in build("2")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in here.iterdir()}
