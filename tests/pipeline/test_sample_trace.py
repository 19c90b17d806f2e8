import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.sample_trace import SampleTrace, digest, truncate_after

STEPS = 12


def write(run, rank, world, first, last):
    """What rank `rank` of `world` writes of a run whose step s has samples s.0 ... s.5."""
    trace = SampleTrace(run, rank)
    share = 6 // world
    for step in range(first, last):
        names = [f"{step}.{number}" for number in range(rank * share, (rank + 1) * share)]
        values = torch.tensor([[float(name)] for name in names])
        trace.write(step, names, values, values)
    trace.close()


def lines(run, kind):
    return sorted(
        line for path in run.glob(f"samples/{kind}-*.txt") for line in path.read_text().splitlines()
    )


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 6]), st.integers(1, 4), st.integers(0, 3)), max_size=5))
def test_after_any_history_of_world_sizes_the_trace_is_an_undisturbed_ranks(tmp_path_factory, legs):
    run, undisturbed = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("undisturbed")
    step = 0
    for world, steps, lost in [*legs, (2, STEPS, 0)]:
        truncate_after(run, step)
        end = min(step + steps, STEPS)
        for rank in range(world):
            write(run, rank, world, step, end)
        step = max(0, end - lost)
    write(undisturbed, 0, 1, 0, STEPS)
    for kind in ("rank", "pixels-rank"):
        assert lines(run, kind) == lines(undisturbed, kind)


def test_a_line_that_a_kill_cut_off_is_taken_back_and_so_is_what_is_none(tmp_path):
    write(tmp_path, 0, 1, 0, 3)
    for name in ("rank-0.txt", "pixels-rank-0.txt"):
        with open(tmp_path / "samples" / name, "a") as file:
            file.write("\n\x00\x00 2\n2 2.")
    truncate_after(tmp_path, 3)
    assert len(lines(tmp_path, "rank")) == len(lines(tmp_path, "pixels-rank")) == 18


def test_a_digest_is_of_values_not_of_their_layout():
    images = torch.rand(2, 3, 4, 5)
    strided = images.to(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        assert digest(images.to(dtype)[1]) == digest(strided.to(dtype)[1])
    changed = images.clone()
    changed[1, 2, 3, 4] += 1e-6
    assert digest(changed[1]) != digest(images[1])
