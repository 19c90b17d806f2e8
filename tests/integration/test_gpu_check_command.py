"""The whole of gpu-check at reduced size on the CPU."""

import json

import forkserver
import pytest

from pipeline.gpu_check.registry import CHECKS


@pytest.mark.soak
def test_all_checks_pass_on_the_cpu(tmp_path):
    path = tmp_path / "report.json"
    done = forkserver.run(["-m", "pipeline", "gpu-check", "--device", "cpu", "--json", path])
    report = json.loads(path.read_text())
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert list(verdicts) == [check.name for check in CHECKS]
    assert done.returncode == 0 and "failed" not in verdicts.values(), done.stdout + done.stderr
    assert report["recommended"].keys() == {
        "engine.micro_batch",
        "engine.zero_stage",
        "engine.compile",
        "data.decode_threads",
    }
