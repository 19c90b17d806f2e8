"""`folder` with captions, hidden folders, links and archives among the images."""

import json

import pytest
from published import link, tar_of, zip_of

from data_prep.shard_set import read_index, read_manifest


def quarantined(out):
    lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    return {line["source"]: line["reason"] for line in lines}


def test_image_is_kept_beside_a_caption_with_its_key(tmp_path, photographs, data_prep):
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


def test_folder_of_links_is_a_user_error(tmp_path, photographs, data_prep):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (tmp_path / "photograph.jpg").write_bytes(photographs[0])
    (source / "link.jpg").symlink_to(tmp_path / "photograph.jpg")
    done = data_prep("folder", source, out)
    assert done.returncode == 2 and "(1 link)" in done.stderr and "link.jpg" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("form", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("top", ["", "pictures/"])
def test_archive_builds_the_shards_of_its_folder(image_folder, tmp_path, data_prep, form, top):
    files = {f"{top}{path.relative_to(image_folder)}": path.read_bytes() for path in image_folder.rglob("*.jpg")}
    files[f"{top}bee/notes.txt"] = b"no image"
    files[f"{top}.thumbnails/a.jpg"] = files[f"{top}ant/000.jpg"]
    files[f"{top}../../climbs.jpg"] = files[f"{top}ant/000.jpg"]
    archive = tmp_path / f"pictures.{form}"
    archive.write_bytes(
        zip_of(files, method=8)
        if form == "zip"
        else tar_of(files, link(f"{top}ant/link.jpg"), mode="w:gz" if form == "tar.gz" else "w")
    )
    expected, out = tmp_path / "expected", tmp_path / "out"
    assert data_prep("folder", image_folder, expected).returncode == 0
    done = data_prep("folder", archive, out)
    assert done.returncode == 0, done.stderr
    for name in ("folder-train-000000.tar", "folder-train-000000.idx"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    reasons = [json.loads(line)["reason"] for line in (out / "quarantine.jsonl").open()]
    assert sorted(reasons) == ["hidden", *(["link"] if form != "zip" else []), "not_an_image", "unsafe_name"]
    assert data_prep("verify", out).returncode == 0


def test_image_beside_an_archives_folders_disables_labels(tmp_path, photographs, data_prep):
    archive, files = tmp_path / "a.zip", {"ant/1.jpg": photographs[0], "bee/2.jpg": photographs[1]}
    archive.write_bytes(zip_of({**files, "readme.txt": b"hello"}))
    assert data_prep("folder", archive, tmp_path / "labeled").returncode == 0
    assert read_manifest(tmp_path / "labeled").classes == ("ant", "bee")
    assert quarantined(tmp_path / "labeled") == {"a.zip": "no_class"}
    archive.write_bytes(zip_of({**files, "3.jpg": photographs[2]}))
    assert data_prep("folder", archive, tmp_path / "plain").returncode == 0
    assert read_manifest(tmp_path / "plain").classes == ()
    archive.write_bytes(zip_of(files)[:-40])
    done = data_prep("folder", archive, tmp_path / "cut")
    assert done.returncode == 2 and "a.zip" in done.stderr and "truncated" in done.stderr


def test_source_without_images_is_summarized(tmp_path, data_prep):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.txt").write_text("words")
    (source / "page.html").write_text("<!doctype html>")
    (source / "none.jpg").touch()
    done = data_prep("folder", source, tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("data_prep: ") == 1
    assert "7 inputs rejected (6 not_an_image, 1 empty)" in done.stderr.splitlines()[-1]
