"""engine.compile does not change the results of a run."""

import pytest
from pytest import approx
from runs import launch_processes

STEPS = 6


@pytest.mark.soak
def test_compiled_run_has_the_losses_of_an_eager_run(run, other_run, tmp_path, monkeypatch):
    eager = [line["loss"] for line in other_run.train(train__steps=STEPS)]
    generated = tmp_path / "generated"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(generated))
    monkeypatch.setenv("TORCH_LOGS", "graph_breaks,recompiles")
    run.launch = launch_processes  # torch reads TORCH_LOGS when it is imported
    compiled = [line["loss"] for line in run.train(train__steps=STEPS, engine__compile="true")]
    assert compiled == approx(eager, rel=1e-5)
    assert any(generated.rglob("*.py")), "nothing was compiled"
    output = run.output.read_text()
    assert "Graph break" not in output and "Recompiling" not in output
