"""Tars as they occur: joined, with sparse members, with garbage behind them, damaged, or no tars at all."""

import gzip
import json
import shutil
import subprocess
import tarfile

import pytest
from published import WNIDS, tar_of, write_tree
from shard_contents import quarantine, samples

from data_prep.errors import UserError
from data_prep.sources.containers import iter_entries


def _names(folder, name="a.tar") -> list[str]:
    return [entry.name for entry in iter_entries(folder, name)]


@pytest.mark.parametrize("form", ["tar", "tar.gz", "class tar"])
def test_members_of_joined_tars_are_all_read(photographs, tmp_path, data_prep, form):
    files = {f"{WNIDS[0]}_{number}.JPEG": photographs[number] for number in range(6)}
    parts = [dict(list(files.items())[first : first + 2]) for first in (0, 2, 4)]
    if form == "class tar":
        joined = b"".join(map(tar_of, parts))
        source = write_tree(tmp_path / "src", {"ILSVRC2012_img_train.tar": tar_of({f"{WNIDS[0]}.tar": joined})})
        command = "imagenet"
    else:
        mode = "w:gz" if form == "tar.gz" else "w"
        source = tmp_path / f"photographs.{form}"
        source.write_bytes(b"".join(tar_of(part, mode=mode) for part in parts))
        command = "folder"
    done = data_prep(command, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path / "out") == {name.removesuffix(".JPEG"): data for name, data in files.items()}


def test_garbage_behind_a_tar_is_ignored_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.tar").write_bytes(tar_of({"1.jpg": b"x"}) + b"garbage" * 100)
    assert _names(tmp_path) == ["1.jpg"]
    (message,) = caplog.messages
    assert "a.tar" in message and "10,240" in message


def test_a_damaged_header_inside_a_tar_is_an_error(tmp_path):
    data = bytearray(tar_of({"1.jpg": bytes(2000), "2.jpg": b"x", "3.jpg": b"x"}))
    data[data.index(b"2.jpg") + 150] ^= 1  # the checksum
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar: .*header"):
        _names(tmp_path)


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_a_sparse_member_is_quarantined_alone(photographs, tmp_path, data_prep, format):
    source = write_tree(tmp_path / "src", {f"{number}.jpg": photographs[number] for number in range(3)})
    with open(source / "1_sparse.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(photographs[3])
    archive = tmp_path / "a.tar"
    names = ["0.jpg", "1_sparse.jpg", "1.jpg", "2.jpg"]
    subprocess.run(["tar", "-S", f"--format={format}", "-cf", archive, "-C", source, *names], check=True)
    with tarfile.open(archive) as tar:
        assert [member.issparse() for member in tar] == [False, True, False, False]
    done = data_prep("folder", archive, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path / "out") == {str(number): photographs[number] for number in range(3)}
    assert quarantine(tmp_path / "out") == {"1_sparse.jpg": "special_file"}


@pytest.mark.parametrize("command", ["folder", "imagenet21k"])
@pytest.mark.parametrize("content", ["page", "empty", "truncated", "truncated gz"])
def test_errors_name_an_archive_that_is_no_tar(photographs, tmp_path, data_prep, command, content):
    tar = tar_of({"1.jpg": photographs[0]})
    contents = {"page": b"<!DOCTYPE html><html>Sign in</html>" * 50, "empty": b"", "truncated": tar[:2000]}
    contents["truncated gz"] = gzip.compress(tar)[:-1000]
    source = tmp_path / "photographs.tar"
    source.write_bytes(contents[content])
    done = data_prep(command, source, tmp_path / "out")
    assert done.returncode == 2 and "photographs.tar: " in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_quarantine_names_an_archive_given_as_source(photographs, tmp_path, data_prep):
    source = tmp_path / "photographs.tar"
    source.write_bytes(tar_of({"1.jpg": photographs[0], "2.jpg": photographs[1][:999], ".3.jpg": photographs[2]}))
    assert data_prep("folder", source, tmp_path / "out").returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["source"], line["member"]) for line in lines] == [
        ("photographs.tar", ".3.jpg"),
        ("photographs.tar", "2.jpg"),
    ]


def test_a_shard_set_is_no_source_of_images(image_folder, tmp_path, data_prep):
    shards = tmp_path / "shards"
    assert data_prep("folder", image_folder, shards / "photographs").returncode == 0
    shutil.copytree(image_folder / "ant", shards / "ant")
    for source in (shards / "photographs", shards):
        done = data_prep("folder", source, tmp_path / "out")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
        assert f"{shards / 'photographs'}: already a shard set" in done.stderr
    (image_folder / "manifest.json").write_text("{}")  # of something else
    assert data_prep("folder", image_folder, tmp_path / "out").returncode == 0


def test_classes_without_images_are_reported(photographs, tmp_path, data_prep):
    source = write_tree(tmp_path / "src", {"ant/1.jpg": photographs[0], "bee/2.jpg": photographs[1][:500]})
    (source / "cat").mkdir()
    done = data_prep("folder", source, tmp_path / "out")
    assert done.returncode == 0
    assert "cat" in done.stdout, "it has no file, so it is no class"
    (line,) = (line for line in done.stderr.splitlines() if "no image" in line)
    assert "1 of 2 classes" in line and line.endswith("bee")
