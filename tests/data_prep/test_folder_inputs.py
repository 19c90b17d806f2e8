"""What lies in people's folders beside their photographs."""

import json

from data_prep.shard_set import read_index, read_manifest


def quarantined(out):
    return {
        json.loads(line)["source"]: json.loads(line)["reason"] for line in (out / "quarantine.jsonl").open()
    }


def test_a_photograph_does_not_give_way_to_its_caption(tmp_path, photographs, data_prep):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.jpg").write_bytes(photographs[number])
        (source / f"{number}.caption").write_text("a dog")
        (source / f"{number}.JSON").write_text("{}")
    assert data_prep("folder", source, out).returncode == 0
    manifest = read_manifest(out)
    assert sorted(read_index(out, manifest.shards[0]).keys) == [str(number) for number in range(6)]
    assert all(not name.endswith(".jpg") for name in quarantined(out))


def test_hidden_folders_are_no_classes(tmp_path, photographs, data_prep):
    source, out = tmp_path / "source", tmp_path / "out"
    for number, folder in enumerate((".ipynb_checkpoints", "ant", "bee")):
        (source / folder).mkdir(parents=True)
        (source / folder / f"{number}.jpg").write_bytes(photographs[number])
    assert data_prep("folder", source, out).returncode == 0
    assert read_manifest(out).classes == ("ant", "bee")
    assert quarantined(out) == {".ipynb_checkpoints": "hidden"}


def test_a_folder_of_links_is_one_clear_line_and_leaves_nothing(tmp_path, photographs, data_prep):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (tmp_path / "photograph.jpg").write_bytes(photographs[0])
    (source / "link.jpg").symlink_to(tmp_path / "photograph.jpg")
    done = data_prep("folder", source, out)
    assert done.returncode == 2 and "link.jpg: link: a symbolic link, which is never followed" in done.stderr
    assert not out.exists()
