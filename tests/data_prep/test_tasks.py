"""A build shared by array tasks has the same bytes as a build by one process."""

import pytest
from file_contents import read_tree


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1, 0), (1, 2, 2, 0)])
def test_tasks_in_any_order_build_the_same_set(image_folder, tmp_path, data_prep, order):
    (image_folder / "bee" / "notes.txt").write_text("no image")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    arguments = ("--shard-size", 4)
    data_prep("folder", image_folder, alone, *arguments)
    for index in order:
        done = data_prep("folder", image_folder, shared, *arguments, "--task-index", index, "--num-tasks", 3)
        assert done.returncode == 0, done.stderr
    assert not (shared / "manifest.json").exists()
    assert data_prep("finalize", shared).returncode == 0
    assert read_tree(shared) == read_tree(alone)
    again = data_prep("finalize", shared)
    assert again.returncode == 0 and "already complete" in again.stdout


def test_finalize_names_missing_shards(image_folder, tmp_path, data_prep):
    out = tmp_path / "shards"
    data_prep("folder", image_folder, out, "--shard-size", 5, "--task-index", 1, "--num-tasks", 3)
    done = data_prep("finalize", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "4 of 6 shards" in done.stderr and "folder-train-000000, folder-train-000002" in done.stderr
    assert data_prep("finalize", tmp_path / "nowhere").returncode == 2


def test_tasks_without_a_shard_succeed(image_folder, tmp_path, data_prep):
    out = tmp_path / "shards"
    for index in range(4):
        arguments = ("--shard-size", 100, "--task-index", index, "--num-tasks", 4)
        done = data_prep("folder", image_folder, out, *arguments)
        assert done.returncode == 0, done.stderr
    assert data_prep("finalize", out).returncode == 0


def test_task_index_without_num_tasks_is_an_error(image_folder, tmp_path, data_prep):
    assert data_prep("folder", image_folder, tmp_path / "o", "--task-index", 1).returncode == 2
    done = data_prep("folder", image_folder, tmp_path / "o", "--task-index", 3, "--num-tasks", 3)
    assert done.returncode == 2 and "--num-tasks" in done.stderr
