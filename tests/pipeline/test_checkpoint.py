"""Checkpoints on disk are complete, verified, retained as configured, and readable in later versions."""

import hashlib
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_run import SINGLE_PROCESS

from pipeline.errors import AllRanksError, UserError
from pipeline.recipe.sections import GuardSection, TrainSection
from pipeline.train import checkpoint
from pipeline.train.guard import BadSpan, Guard, SkippedStep
from pipeline.train.metric_accumulator import MetricAccumulator
from pipeline.train.rollback import rollback
from pipeline.train.run_directory import RunDirectory


def new_guard(state=None) -> Guard:
    return Guard(GuardSection(), "fp32", torch.device("cpu"), state)


def write(directory, step, content=b"weights", keep=10, every=None, scheduled_every=1, **state):
    """Write a checkpoint with two files. Returns its path."""
    partial = directory / (checkpoint.checkpoint_name(step) + checkpoint.PARTIAL)
    (partial / "inner").mkdir(parents=True)
    (partial / "model.pt").write_bytes(content)
    (partial / "inner" / "optimizer.pt").write_bytes(content * 3)
    files = checkpoint.fsync_and_hash(partial, checkpoint.list_files(partial))
    retention = TrainSection(steps=1, checkpoint_every=scheduled_every, keep_checkpoints=keep, keep_every=every)
    return checkpoint.publish(directory, step, {"step": step, **state, "files": files}, retention)


def newest_step(directory) -> int:
    path = checkpoint.latest_valid_checkpoint(directory)
    assert path
    return checkpoint.read_state(path)["step"]


def test_latest_names_the_newest_and_old_ones_are_deleted(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
        assert (tmp_path / "latest").read_text() == checkpoint.checkpoint_name(step)
    assert checkpoint.checkpoint_steps(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_partial_checkpoint_is_never_used(tmp_path):
    write(tmp_path, 1)
    partial = tmp_path / (checkpoint.checkpoint_name(2) + checkpoint.PARTIAL)
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    assert newest_step(tmp_path) == 1
    checkpoint.remove_partial(tmp_path, 1)
    assert not partial.exists()


@given(st.integers(0, 7 * 8 - 1), st.sampled_from(["model.pt", "inner/optimizer.pt"]))
def test_flipped_bit_of_a_file_is_detected(tmp_path_factory, bit, name):
    path = write(tmp_path_factory.mktemp("checkpoints"), 1)
    data = bytearray((path / name).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (path / name).write_bytes(data)
    assert len(checkpoint.verify_files(path, checkpoint.list_files(path))) == 1


def test_flipped_bit_of_state_json_is_detected(tmp_path):
    path = write(tmp_path, 1) / "state.json"
    content = path.read_bytes()
    state = checkpoint.read_state(path.parent)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert checkpoint.read_state(path.parent) == state  # only white space changed
        except ValueError:
            continue


def test_multiples_of_keep_every_are_kept(tmp_path):
    for step in range(1, 10):
        write(tmp_path, step, keep=2, every=3)
    assert checkpoint.checkpoint_steps(tmp_path) == [3, 6, 8, 9]


@pytest.mark.parametrize("name", ["model.pt", "inner/optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["removed", "truncated", "emptied"])
def test_damaged_newest_checkpoint_is_skipped(tmp_path, capsys, name, damage):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "truncated" else b"")
    assert newest_step(tmp_path) == 1
    assert "step-00000002 is damaged" in capsys.readouterr().err


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    (write(tmp_path, 1) / "model.pt").unlink()
    with pytest.raises(AllRanksError, match="every checkpoint is damaged"):
        checkpoint.latest_valid_checkpoint(tmp_path)


def test_missing_checkpoints_are_an_error_unless_latest_is(tmp_path):
    shutil.rmtree(write(tmp_path, 1))
    with pytest.raises(AllRanksError, match=f"{tmp_path / 'latest'}: "):
        checkpoint.latest_valid_checkpoint(tmp_path)
    (tmp_path / "latest").unlink()
    assert checkpoint.latest_valid_checkpoint(tmp_path) is None


def test_unreadable_directory_is_not_an_empty_one(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.symlink_to(checkpoints)  # not even root can list a loop
    with pytest.raises(AllRanksError, match="Too many levels of symbolic links"):
        checkpoint.latest_valid_checkpoint(checkpoints)
    (tmp_path / "file").touch()
    with pytest.raises(AllRanksError, match="Not a directory"):
        checkpoint.latest_valid_checkpoint(tmp_path / "file")
    with pytest.raises(UserError, match="Not a directory") as caught:
        checkpoint.latest_checkpoint_with(tmp_path / "file", "model.pt")
    assert not isinstance(caught.value, AllRanksError)  # which only rank 0 would print


def test_damaged_checkpoint_is_replaced_when_trained_again(tmp_path):
    (write(tmp_path, 5) / "model.pt").unlink()
    replaced = write(tmp_path, 5, b"better")
    assert checkpoint.verify_files(replaced, checkpoint.list_files(replaced)) == []
    assert (replaced / "model.pt").read_bytes() == b"better"


def test_save_writes_parts_then_shared_files(tmp_path):
    written = []

    def write_part(directory):
        (directory / "rank-0").write_text("part")
        written.append("part")

    def write_shared(directory):
        assert (directory / "rank-0").exists()
        (directory / "weights").write_text("shared")
        written.append("shared")

    retention = TrainSection(steps=4)
    checkpoint.save(write_part, write_shared, tmp_path, 4, {"data": "x"}, retention, SINGLE_PROCESS)
    path = checkpoint.latest_valid_checkpoint(tmp_path)
    assert path and path.name == "step-00000004" and written == ["part", "shared"]
    state = checkpoint.read_state(path)
    assert state["step"] == 4 and state["data"] == "x" and state["files"].keys() == {"rank-0", "weights"}


def test_first_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    directory = tmp_path / "checkpoints"
    directory.write_text("not a directory")

    def write_files(_):
        raise AssertionError("called without a directory")

    with pytest.raises(AllRanksError, match=rf"^{directory}: checkpoint of step 4 .* GiB free.*storage"):
        checkpoint.save(write_files, write_files, directory, 4, {}, TrainSection(steps=4), SINGLE_PROCESS)


def test_failed_checkpoint_leaves_no_partial_one(tmp_path):
    write(tmp_path, 1)

    def write_part(directory):
        (directory / "rank-0").write_text("part")
        raise OSError(28, "No space left on device")

    with pytest.raises(AllRanksError, match=r"No space left on device.* free some space"):
        checkpoint.save(write_part, write_part, tmp_path, 4, {}, TrainSection(steps=4), SINGLE_PROCESS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


@given(
    st.dictionaries(st.integers(1, 200), st.booleans(), min_size=1),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 200)),
)
def test_retention_keeps_the_target_of_a_rollback(is_scheduled, keep, first_skipped):
    steps = sorted(is_scheduled)
    scheduled = [step for step in steps if is_scheduled[step]]
    retention = TrainSection(steps=1, keep_checkpoints=keep)
    deleted = checkpoint.checkpoints_to_delete(steps, scheduled, retention, first_skipped)
    kept = sorted(set(steps) - set(deleted))
    assert kept[-1] == steps[-1]
    assert [step for step in kept if is_scheduled[step]][-keep:] == scheduled[-keep:]
    before = [step for step in scheduled if first_skipped is None or step < first_skipped]
    assert set(before[-1:]) <= set(kept)
    assert min(keep, len(steps)) <= len(kept) <= keep + 2


def test_rollback_targets_survive_a_change_of_schedule(tmp_path):
    run, guard = RunDirectory(tmp_path), new_guard()
    for step, every in ((4, 4), (8, 4), (12, 4), (13, 4), (15, 5)):  # 13 was made by a signal
        write(run.checkpoints, step, keep=2, scheduled_every=every, guard=guard.state_dict())
    assert checkpoint.checkpoint_steps(run.checkpoints) == [12, 15]
    for first_step, target in ((16, 15), (14, 12)):
        bad_span = BadSpan(first_step, first_step + 1, "the loss is not finite")
        path = rollback(run, bad_span, guard, 16, 7, SINGLE_PROCESS)
        assert path.name == checkpoint.checkpoint_name(target)


def test_failed_rollback_deletes_nothing(tmp_path):
    run, guard = RunDirectory(tmp_path), new_guard()
    for step in (1, 2, 3):
        write(run.checkpoints, step, guard=guard.state_dict())
    for step in (1, 2):
        (run.checkpoints / checkpoint.checkpoint_name(step) / "model.pt").unlink()
    bad_span = BadSpan(3, 4, "the loss is not finite")
    with pytest.raises(AllRanksError, match="every checkpoint is damaged"):
        rollback(run, bad_span, guard, 16, 1, SINGLE_PROCESS)
    assert newest_step(run.checkpoints) == 3


def test_checkpoint_without_scheduled_flag_is_dated_by_its_step(tmp_path):
    for step in (3, 4, 8):
        path = write(tmp_path, step)
        state = checkpoint.read_state(path)
        del state["scheduled"]
        checkpoint.write_state(path, state)
    assert checkpoint.scheduled_checkpoint_steps(tmp_path, 4) == [4, 8]


# ---- Checkpoints of earlier versions

OLD_EVENT = {
    "step": 8,
    "event": "return",
    "time": 1.5,
    "from_step": 11,
    "trouble": [10, 11],
    "reason": "the loss is not finite",
    "skipped_samples": 48,
    "in_a_row": 1,
}
EVENT = {**{key: value for key, value in OLD_EVENT.items() if key != "trouble"}, "bad_span": [10, 11]}
EVENT["event"] = "rollback"
OLD_STATE = {
    "step": 12,
    "window": {"loss": [0.5], "grad_norm": [1.0], "skipped": [0.0, 1.0], "replaced": [2.0]},
    "guard": {
        "losses": [0.75, 0.5],
        "row": [12],
        "overflows": 3,
        "skips": [[12, "the loss is a spike", 9.0, None]],
        "offset": 48,
        "returns": [OLD_EVENT],
    },
    "unmeasured": True,
}


@pytest.fixture
def old_checkpoint(tmp_path):
    """A checkpoint whose state.json was written, and signed, by an earlier version."""
    path = write(tmp_path / "checkpoints", 12)
    state = {**OLD_STATE, "scheduled": True, "files": checkpoint.read_state(path)["files"]}
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps({**state, "checksum": digest}, indent=1))
    return path


def test_old_state_json_is_valid_and_upgraded(old_checkpoint):
    assert checkpoint.latest_valid_checkpoint(old_checkpoint.parent) == old_checkpoint
    state = checkpoint.read_state(old_checkpoint)
    assert state["eval_failed"] is True and state["metrics"] == OLD_STATE["window"]
    assert not {"window", "unmeasured"} & state.keys()


def test_old_metrics_are_continued_under_new_names(old_checkpoint):
    metrics = MetricAccumulator(checkpoint.read_state(old_checkpoint)["metrics"])
    step = {"loss": 1.5, "grad_norm": 2.0, "skipped": 0.0, "undecodable": 4.0}
    metrics.add({name: torch.tensor(value) for name, value in step.items()})
    assert metrics.compute_and_reset() == {"loss": 1.0, "grad_norm": 1.5, "skipped": 1, "undecodable": 3.0}


def test_old_guard_state_is_upgraded(old_checkpoint):
    guard = new_guard(checkpoint.read_state(old_checkpoint)["guard"])
    assert guard.rollbacks == [EVENT] and guard.offset == 48
    assert guard.skipped_steps == [SkippedStep(12, "the loss is a spike", 9.0, None)]
    assert guard.state_dict() == {
        "losses": [0.75, 0.5],
        "consecutive_skips": [12],
        "overflows": 3,
        "skipped_steps": [SkippedStep(12, "the loss is a spike", 9.0, None)],
        "offset": 48,
        "rollbacks": [EVENT],
    }


def test_rollback_to_an_old_checkpoint_keeps_its_guard_state(old_checkpoint):
    run = RunDirectory(old_checkpoint.parents[1])
    guard = new_guard(checkpoint.read_state(old_checkpoint)["guard"])
    bad_span = BadSpan(13, 14, "the loss is not finite")
    path = rollback(run, bad_span, guard, 16, 4, SINGLE_PROCESS)
    resumed = new_guard(checkpoint.read_state(path)["guard"])
    assert path == old_checkpoint and resumed.offset == 48 + 2 * 16
    assert [event["bad_span"] for event in resumed.rollbacks] == [[10, 11], [13, 14]]
    assert resumed.rollbacks[0] == EVENT and resumed.state_dict()["consecutive_skips"] == [12]
