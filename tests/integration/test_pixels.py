"""Every step sees the same pixels, however often a run is killed and on however many ranks it resumes."""

STEPS = 12


def read_trace(run, kind):
    """Return (step, key and, for pixels, digest) of all ranks, sorted."""
    files = (run.directory / "samples").glob(f"{kind}-*.txt")
    return sorted(tuple(line.split(" ")) for path in files for line in path.read_text().splitlines())


def test_pixels_do_not_depend_on_kills_and_ranks(run, other_run):
    settings = {"train__steps": STEPS, "data__trace": True}
    other_run.train(1, **settings)
    for ranks, step in ((2, 6), (1, 10)):
        run.kill_at(ranks, f"step {step}", **settings)
    run.train(2, **settings)
    assert len(read_trace(other_run, "rank")) == STEPS * 16
    assert read_trace(run, "rank") == read_trace(other_run, "rank")
    assert read_trace(run, "pixels-rank") == read_trace(other_run, "pixels-rank")
