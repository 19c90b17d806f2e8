"""The protocol on disk; that DeepSpeed's files come back right is tests/integration's business."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError, UserError
from pipeline.recipe.sections import GuardSection, TrainSection
from pipeline.train import checkpoint
from pipeline.train.guard import BadSpan, Guard
from pipeline.train.rollback import rollback


def write(directory, step, content=b"weights", keep=10, every=None, scheduled_every=1, **state):
    partial = directory / (checkpoint.checkpoint_name(step) + checkpoint.PARTIAL)
    (partial / "inner").mkdir(parents=True)
    (partial / "model.pt").write_bytes(content)
    (partial / "inner" / "optimizer.pt").write_bytes(content * 3)
    files = checkpoint.fsync_and_hash(partial, checkpoint.list_files(partial))
    retention = TrainSection(
        steps=1, checkpoint_every=scheduled_every, keep_checkpoints=keep, keep_every=every
    )
    return checkpoint.publish(directory, step, {"step": step, **state, "files": files}, retention)


def test_latest_names_the_newest_and_only_so_many_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
        assert (tmp_path / "latest").read_text() == checkpoint.checkpoint_name(step)
    assert checkpoint.checkpoint_steps(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_what_is_being_written_is_never_taken_for_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    partial = tmp_path / (checkpoint.checkpoint_name(2) + checkpoint.PARTIAL)
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    assert checkpoint.latest_valid_checkpoint(tmp_path).name == checkpoint.checkpoint_name(1)
    checkpoint.remove_partial(tmp_path, 1)
    assert not partial.exists()


@given(st.integers(0, 7 * 8 - 1), st.sampled_from(["model.pt", "inner/optimizer.pt"]))
def test_one_flipped_bit_is_found(tmp_path_factory, bit, name):
    found = write(tmp_path_factory.mktemp("checkpoints"), 1)
    data = bytearray((found / name).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (found / name).write_bytes(data)
    assert len(checkpoint.verify_files(found, checkpoint.list_files(found))) == 1


def test_every_flipped_bit_of_state_json_is_found_or_changes_nothing(tmp_path):
    path = write(tmp_path, 1) / "state.json"
    content = path.read_bytes()
    state = checkpoint.read_state(path.parent)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert checkpoint.read_state(path.parent) == state  # white space
        except ValueError:
            continue


def test_multiples_of_keep_every_stay_for_good(tmp_path):
    for step in range(1, 10):
        write(tmp_path, step, keep=2, every=3)
    assert checkpoint.checkpoint_steps(tmp_path) == [3, 6, 8, 9]


@pytest.mark.parametrize("name", ["model.pt", "inner/optimizer.pt", "state.json"])
@pytest.mark.parametrize("how", ["removed", "cut", "emptied"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, capsys, name, how):
    write(tmp_path, 1)
    victim = write(tmp_path, 2) / name
    if how == "removed":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1] if how == "cut" else b"")
    assert checkpoint.latest_valid_checkpoint(tmp_path).name == checkpoint.checkpoint_name(1)
    assert "step-00000002 is damaged" in capsys.readouterr().err


def test_when_all_are_damaged_nothing_is_begun_anew(tmp_path):
    (write(tmp_path, 1) / "model.pt").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.latest_valid_checkpoint(tmp_path)


def test_when_all_are_gone_nothing_is_begun_anew_unless_the_user_says_so(tmp_path):
    shutil.rmtree(write(tmp_path, 1))
    with pytest.raises(UserError, match=r"latest: names a checkpoint, and there is none; put it back, or re"):
        checkpoint.latest_valid_checkpoint(tmp_path)
    (tmp_path / "latest").unlink()
    assert checkpoint.latest_valid_checkpoint(tmp_path) is None


def test_a_directory_that_cannot_be_listed_is_no_empty_one(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.symlink_to(checkpoints)  # of a loop not even root learns what is in it
    with pytest.raises(AllRanksError, match="Too many levels of symbolic links"):
        checkpoint.latest_valid_checkpoint(checkpoints)
    (tmp_path / "file").touch()
    with pytest.raises(AllRanksError, match="Not a directory"):
        checkpoint.latest_valid_checkpoint(tmp_path / "file")
    with pytest.raises(UserError, match=r"Not a directory.*; mend the storage") as refusal:
        checkpoint.latest_checkpoint_with(tmp_path / "file", "model.pt")
    assert not isinstance(refusal.value, AllRanksError)  # each rank would leave it to rank 0


def test_a_run_that_comes_by_a_damaged_checkpoint_again_replaces_it(tmp_path):
    (write(tmp_path, 5) / "model.pt").unlink()
    replaced = write(tmp_path, 5, b"better")
    assert checkpoint.verify_files(replaced, checkpoint.list_files(replaced)) == []
    assert (replaced / "model.pt").read_bytes() == b"better"


def test_a_first_checkpoint_that_finds_no_place_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("no directory")
    world = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)
    with pytest.raises(
        AllRanksError, match=r"checkpoint of step 4 cannot be written: .*GiB are free.*: mend the storage"
    ):
        checkpoint.save(None, None, tmp_path / "checkpoints", 4, {}, TrainSection(steps=4), world)


@given(
    st.dictionaries(st.integers(1, 200), st.booleans(), min_size=1),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 200)),
)
def test_the_guard_finds_a_way_back_whatever_is_kept_and_whoever_interrupted(made, keep, first):
    steps = sorted(made)
    scheduled = [step for step in steps if made[step]]
    retention = TrainSection(steps=1, keep_checkpoints=keep)
    left = sorted(set(steps) - set(checkpoint.checkpoints_to_delete(steps, scheduled, retention, first)))
    assert left[-1] == steps[-1]
    assert [step for step in left if made[step]][-keep:] == scheduled[-keep:]
    before = [step for step in scheduled if first is None or step < first]
    assert set(before[-1:]) <= set(left)
    assert min(keep, len(steps)) <= len(left) <= keep + 2


def test_another_schedule_takes_no_checkpoint_of_the_one_before_and_no_way_back(tmp_path):
    guard = Guard(GuardSection(), "fp32", torch.device("cpu"), None)
    for step, every in ((4, 4), (8, 4), (12, 4), (13, 4), (15, 5)):  # 13: a signal's
        write(tmp_path / "checkpoints", step, keep=2, scheduled_every=every, guard=guard.state())
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [12, 15]
    world = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)
    for first, found in ((16, 15), (14, 12)):
        trouble = BadSpan(first, first + 1, "the loss is not finite")
        assert rollback(tmp_path, trouble, guard, 16, 7, world).name == checkpoint.checkpoint_name(found)


def test_a_return_removes_nothing_before_it_has_found_where_to(tmp_path):
    guard = Guard(GuardSection(), "fp32", torch.device("cpu"), None)
    for step in (1, 2, 3):
        write(tmp_path / "checkpoints", step, guard=guard.state())
    for step in (1, 2):
        (tmp_path / "checkpoints" / checkpoint.checkpoint_name(step) / "model.pt").unlink()
    world, trouble = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1), BadSpan(3, 4, "the loss is not finite")
    with pytest.raises(AllRanksError, match="every checkpoint is damaged"):
        rollback(tmp_path, trouble, guard, 16, 1, world)
    assert checkpoint.latest_valid_checkpoint(tmp_path / "checkpoints").name == checkpoint.checkpoint_name(3)


def test_a_checkpoint_that_does_not_say_whether_it_is_scheduled_is_judged_by_its_step(tmp_path):
    for step in (3, 4, 8):
        path = write(tmp_path, step)
        state = checkpoint.read_state(path)
        del state["scheduled"]
        checkpoint.write_state(path, state)
    assert checkpoint.scheduled_steps(tmp_path, 4) == [4, 8]
