"""However often a run is killed and on however many ranks it goes on, every step sees the same pixels."""

STEPS = 12


def trace(run, kind):
    """(step, key and, for pixels, digest) of all ranks, sorted."""
    files = (run.directory / "samples").glob(f"{kind}-*.txt")
    return sorted(tuple(line.split(" ")) for path in files for line in path.read_text().splitlines())


def test_killed_and_continued_on_other_numbers_of_ranks_it_sees_one_ranks_samples_and_pixels(run, other_run):
    settings = {"train__steps": STEPS, "data__trace": True}
    other_run.train(1, **settings)
    for ranks, step in ((2, 6), (1, 10)):
        run.kill_at(ranks, f"step {step}", **settings)
    run.train(2, **settings)
    assert len(trace(other_run, "rank")) == STEPS * 16
    assert trace(run, "rank") == trace(other_run, "rank")
    assert trace(run, "pixels-rank") == trace(other_run, "pixels-rank")
