"""engine.deterministic is in force in a run, and equal runs have equal losses."""

import pytest
from runs import FaultyRun


def test_deterministic_runs_are_equal(run, other_run):
    for one in (run, other_run):
        one.train(2, engine__deterministic="true", train__steps=4)
    assert run.losses() == other_run.losses()


@pytest.mark.parametrize("deterministic", [True, False])
def test_operators_without_deterministic_form_raise(shards, tmp_path, deterministic):
    run = FaultyRun(shards, tmp_path / "run", [{"kind": "nondeterministic"}])
    code = run.start(1, engine__deterministic=str(deterministic).lower(), train__steps=1).wait()
    assert (code != 0) == deterministic
    assert ("put_" in run.output.read_text()) == deterministic
