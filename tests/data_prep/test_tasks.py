"""A build shared by array tasks is the build of one process, to the byte."""

import pytest
from bytes_of import contents


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1, 0), (1, 2, 2, 0)])
def test_three_tasks_in_any_order_one_of_them_twice_build_the_same_set(
    image_folder, tmp_path, data_prep, order
):
    (image_folder / "bee" / "notes.txt").write_text("no image")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    data_prep("folder", image_folder, alone, "--shard-size", 4)
    for index in order:
        done = data_prep(
            "folder", image_folder, shared, "--shard-size", 4, "--task-index", index, "--num-tasks", 3
        )
        assert done.returncode == 0, done.stderr
    assert not (shared / "manifest.json").exists()
    assert data_prep("finalize", shared).returncode == 0
    assert contents(shared) == contents(alone)
    assert "whole already" in data_prep("finalize", shared).stdout


def test_finalize_says_what_is_missing(image_folder, tmp_path, data_prep):
    out = tmp_path / "shards"
    data_prep("folder", image_folder, out, "--shard-size", 5, "--task-index", 1, "--num-tasks", 3)
    done = data_prep("finalize", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "4 of 6 shards are not built yet (folder-train-000000, folder-train-000002" in done.stderr
    assert data_prep("finalize", tmp_path / "nowhere").returncode == 2


def test_of_more_tasks_than_shards_the_last_have_nothing_to_do(image_folder, tmp_path, data_prep):
    out = tmp_path / "shards"
    for index in range(4):
        done = data_prep(
            "folder", image_folder, out, "--shard-size", 100, "--task-index", index, "--num-tasks", 4
        )
        assert done.returncode == 0, done.stderr
    assert data_prep("finalize", out).returncode == 0


def test_a_task_index_without_a_number_of_tasks_is_refused(image_folder, tmp_path, data_prep):
    assert data_prep("folder", image_folder, tmp_path / "o", "--task-index", 1).returncode == 2
    done = data_prep("folder", image_folder, tmp_path / "o", "--task-index", 3, "--num-tasks", 3)
    assert done.returncode == 2 and "below --num-tasks" in done.stderr
