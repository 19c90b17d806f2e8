"""OpenImages and COCO: images and their metadata, in each form in which they are published."""

import zipfile

import numpy as np
import pytest
from file_contents import decode_pixels
from published import coco_annotations, csv_of, tar_of, write_tree, zip_of
from shard_contents import metadata, quarantine, samples

from data_prep.shard_set import read_manifest
from data_prep.sources.csv_rows import CsvRows

IDS = ("000a1249af2bc5f0", "0001eeaf4aed83f9", "00075905539074f2", "0000b86e2fd18333")
_ID_COLUMNS = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,"
    "OriginalMD5,Thumbnail300KURL,Rotation"
)
_BOX_COLUMNS = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
_BY = "https://creativecommons.org/licenses/by/2.0/"


def _openimages_tables() -> dict[str, str]:
    rotations = ("", "90.0", "0.0", "")
    attribution = (_BY, "https://flickr/people/x", 'Ann "A." Lee, Jr.', "two\nlines, a comma")
    ids = [
        (i, "train", f"https://flickr/{i}.jpg", f"https://flickr/{i}", *attribution, 100, "q1w2==", "", rotation)
        for i, rotation in zip(IDS, rotations, strict=True)
    ]
    labels = "ImageID,Source,LabelName,Confidence"
    human = [
        (IDS[0], "verification", "/m/01", 1),
        (IDS[1], "verification", "/m/02", 1),
        (IDS[0], "crowdsource-verification", "/m/02", 0),
    ]
    machine = [(IDS[0], "machine", "/m/01", 0.7)]
    boxes = [(IDS[1], "xclick", "/m/02", 1, 0.1, 0.4, 0.2, 0.5, 1, 0, 0, 0, -1)]
    return {
        "train-images-boxable-with-rotation.csv": csv_of(_ID_COLUMNS, ids),
        "validation-images-with-rotation.csv": csv_of(_ID_COLUMNS, [(IDS[0], *ids[1][1:11], "180.0")]),
        "oidv7-class-descriptions.csv": csv_of("LabelName,DisplayName", [("/m/01", "Cat"), ("/m/02", "Dog")]),
        "labels/oidv7-train-annotations-human-imagelabels.csv": csv_of(labels, human),
        "labels/oidv7-train-annotations-machine-imagelabels.csv": csv_of(labels, machine),
        "oidv6-train-annotations-bbox.csv": csv_of(_BOX_COLUMNS, boxes),
    }


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz"])
def test_openimages_keeps_metadata_and_rotates(photographs, tmp_path, data_prep, form):
    images = {f"train/{i}.jpg": photographs[n] for n, i in enumerate(IDS)}
    if form == "folder":
        files = dict(images)
    else:
        mode = "w:gz" if form == "tar.gz" else "w"
        halves = (dict(list(images.items())[:2]), dict(list(images.items())[2:]))
        files = {f"train_{n}.{form}": tar_of(half, mode=mode) for n, half in enumerate(halves)}
    source = write_tree(tmp_path / "src", files | _openimages_tables())
    out = tmp_path / "out"
    done = data_prep("openimages", source, out, "--workers", 2, "--shard-size", 2)
    assert done.returncode == 0 and "4 inputs" in done.stdout, done.stderr
    details, images_built = metadata(out), samples(out)
    for n, i in enumerate(IDS):
        assert (details[i]["license"], details[i]["author"]) == (_BY, 'Ann "A." Lee, Jr.')
        assert details[i]["title"] == "two\nlines, a comma" and details[i]["original_url"].endswith(f"{i}.jpg")
        if i != IDS[1]:
            assert images_built[i] == photographs[n] and "rotation" not in details[i]
    assert details[IDS[0]]["labels"] == {
        "positive": [["/m/01", "Cat"]],
        "negative": [["/m/02", "Dog"]],
        "machine": [["/m/01", "Cat", 0.7]],
    }
    (box,) = details[IDS[1]]["boxes"]
    assert box["label"] == ["/m/02", "Dog"]
    assert (box["xmin"], box["xmax"], box["ymin"], box["ymax"]) == (0.1, 0.4, 0.2, 0.5)
    assert (box["IsOccluded"], box["IsInside"]) == (1, -1)
    assert details[IDS[1]]["rotation"] == 90
    assert np.abs(decode_pixels(images_built[IDS[1]]) - np.rot90(decode_pixels(photographs[1]))).mean() < 5


def test_openimages_without_a_rotation_column(photographs, tmp_path, data_prep):
    columns = _ID_COLUMNS.removesuffix(",Rotation")
    row = (IDS[0], "test", "https://flickr/o.jpg", "", _BY, "", "Ann", "", 1, "", "")
    files = {f"images/test/{IDS[0]}.jpg": photographs[0], "test-images.csv": csv_of(columns, [row])}
    source = write_tree(tmp_path / "src", files)
    assert data_prep("openimages", source, tmp_path / "out", "--split", "test").returncode == 0
    assert metadata(tmp_path / "out")[IDS[0]] == {
        "image_id": IDS[0],
        "license": _BY,
        "author": "Ann",
        "original_url": "https://flickr/o.jpg",
    }
    assert data_prep("openimages", source, tmp_path / "none", "--split", "train").returncode == 2


@pytest.mark.parametrize("form", ["zip", "deflated zip", "folder"])
def test_coco_keeps_captions_instances_and_license(photographs, tmp_path, data_prep, form):
    names = [f"{n:012d}.jpg" for n in (139, 285, 632, 724)]
    images = {f"val2017/{name}": photographs[n] for n, name in enumerate(names)}
    if form == "folder":
        files = {**images, **coco_annotations(names)}
    else:
        method = zipfile.ZIP_DEFLATED if form == "deflated zip" else zipfile.ZIP_STORED
        files = {"val2017.zip": zip_of(images, method)}
        files["annotations_trainval2017.zip"] = zip_of(coco_annotations(names), zipfile.ZIP_DEFLATED)
    source = write_tree(tmp_path / "src", files)
    out = tmp_path / "out"
    done = data_prep("coco", source, out, "--split", "val", "--workers", 2, "--shard-size", 3)
    assert done.returncode == 0 and "with annotations): 4 inputs" in done.stdout, done.stderr
    assert samples(out) == {name[:-4]: photographs[n] for n, name in enumerate(names)}
    details = metadata(out)
    first, last = details[names[0][:-4]], details[names[-1][:-4]]
    assert first["captions"] == ["photograph 0"] and first["license"]["name"] == "Attribution"
    (instance,) = first["instances"]
    assert (instance["category"], instance["category_id"]) == ("toothbrush", 90)
    assert instance["bbox"] == [1.0, 2.0, 30.5, 40.0] and instance["segmentation"] == [[1, 2, 3, 4, 5, 6]]
    assert (last["captions"], last["instances"], last["width"]) == ([], [], 160)
    assert (first["image_id"], last["image_id"]) == (100, 103)
    manifest = read_manifest(out)
    assert (manifest.classes, manifest.category_ids) == (("person", "toothbrush"), (1, 90))
    assert manifest.annotation == "instances" and not manifest.has_labels
    assert data_prep("verify", out).returncode == 0


def test_unsafe_members_of_a_zip_are_quarantined(photographs, tmp_path, data_prep):
    linked = zipfile.ZipInfo("val2017/soft.jpg")
    linked.external_attr = 0o120777 << 16
    data = zip_of({"val2017/a.jpg": photographs[0], "../b.jpg": photographs[1], "/c.jpg": photographs[2]})
    source = write_tree(tmp_path / "src", {"val2017.zip": data})
    with zipfile.ZipFile(source / "val2017.zip", "a") as archive:
        archive.writestr(linked, "/etc/passwd")
    out = tmp_path / "out"
    assert data_prep("coco", source, out, "--split", "val").returncode == 0
    assert samples(out) == {"a": photographs[0]}
    assert quarantine(out) == {"../b.jpg": "unsafe_name", "/c.jpg": "unsafe_name", "val2017/soft.jpg": "link"}


def test_damaged_or_missing_coco_files_are_user_errors(photographs, tmp_path, data_prep):
    source = write_tree(tmp_path / "src", {"val2017/1.jpg": photographs[0], "train2014.zip": b"PK no zip"})
    write_tree(source, {"annotations/instances_val2017.json": "{"})
    for split, named in (("val", "instances_val2017.json"), ("test", "test2017.zip"), ("train", "train2014.zip")):
        done = data_prep("coco", source, tmp_path / "out", "--split", split)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_csv_rows_finds_all_rows_of_a_value(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('ImageID,Text\na,1\nb,"x\n""y"", z"\na,2\nc,\na,3\na,4\n')
    table = CsvRows(path, "ImageID")
    assert [row["Text"] for row in table.rows("a")] == ["1", "2", "3", "4"]
    assert table.rows("b") == [{"ImageID": "b", "Text": 'x\n"y", z'}]
    assert table.rows("d") == []
