"""The sample trace lists the samples of every step once, after any history of interruptions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.train.run_directory import RunDirectory
from pipeline.train.sample_trace import SampleTrace, digest, truncate_after

STEPS = 12


def write(run, rank, world_size, first, end):
    """Write a rank's trace of the steps from `first` to before `end`; step s has the samples s.0 ... s.5."""
    trace = SampleTrace(run, rank)
    share = 6 // world_size
    for step in range(first, end):
        names = [f"{step}.{number}" for number in range(rank * share, (rank + 1) * share)]
        values = torch.tensor([[float(name)] for name in names])
        trace.write(step, names, values, values)
    trace.close()


def read_lines(run, kind):
    return sorted(line for path in run.samples.glob(f"{kind}-*.txt") for line in path.read_text().splitlines())


@settings(max_examples=30)  # each example syncs hundreds of files
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 6]), st.integers(1, 4), st.integers(0, 3)), max_size=5))
def test_trace_does_not_depend_on_the_history_of_the_run(tmp_path_factory, starts):
    run, uninterrupted = (RunDirectory(tmp_path_factory.mktemp(name)) for name in ("run", "uninterrupted"))
    step = 0
    for world_size, steps, lost in [*starts, (2, STEPS, 0)]:
        truncate_after(run, step)
        end = min(step + steps, STEPS)
        for rank in range(world_size):
            write(run, rank, world_size, step, end)
        step = max(0, end - lost)
    write(uninterrupted, 0, 1, 0, STEPS)
    for kind in ("rank", "pixels-rank"):
        assert read_lines(run, kind) == read_lines(uninterrupted, kind)


def test_incomplete_and_invalid_lines_are_removed(tmp_path):
    run = RunDirectory(tmp_path)
    write(run, 0, 1, 0, 3)
    for name in ("rank-0.txt", "pixels-rank-0.txt"):
        with open(run.samples / name, "a") as file:
            file.write("\n\x00\x00 2\n2 2.")
    truncate_after(run, 3)
    assert len(read_lines(run, "rank")) == len(read_lines(run, "pixels-rank")) == 18


def test_digest_depends_on_values_not_on_layout():
    images = torch.rand(2, 3, 4, 5)
    strided = images.to(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        assert digest(images.to(dtype)[1]) == digest(strided.to(dtype)[1])
    changed = images.clone()
    changed[1, 2, 3, 4] += 1e-6
    assert digest(changed[1]) != digest(images[1])
