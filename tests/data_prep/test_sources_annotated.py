"""OpenImages and COCO: images and what is known about them, in each form in which they are published."""

import zipfile

import numpy as np
import pytest
from bytes_of import pixels_of
from published import coco_annotations, csv_of, tar_of, write_tree, zip_of
from shard_contents import metadata, quarantine, samples

from data_prep.sources.csv_rows import CsvRows

IDS = ("000a1249af2bc5f0", "0001eeaf4aed83f9", "00075905539074f2", "0000b86e2fd18333")
_ID_COLUMNS = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,"
    "OriginalMD5,Thumbnail300KURL,Rotation"
)
_BOX_COLUMNS = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
_BY = "https://creativecommons.org/licenses/by/2.0/"


def _openimages_tables() -> dict[str, str]:
    rotations = ("", "90.0", "0.0", "")
    ids = [
        (
            i,
            "train",
            f"https://flickr/{i}.jpg",
            f"https://flickr/{i}",
            _BY,
            "https://flickr/people/x",
            'Ann "A." Lee, Jr.',
            "two\nlines, a comma",
            100,
            "q1w2==",
            "",
            turn,
        )
        for i, turn in zip(IDS, rotations, strict=True)
    ]
    labels = "ImageID,Source,LabelName,Confidence"
    return {
        "train-images-boxable-with-rotation.csv": csv_of(_ID_COLUMNS, ids),
        "validation-images-with-rotation.csv": csv_of(_ID_COLUMNS, [(IDS[0], *ids[1][1:11], "180.0")]),
        "oidv7-class-descriptions.csv": csv_of("LabelName,DisplayName", [("/m/01", "Cat"), ("/m/02", "Dog")]),
        "labels/oidv7-train-annotations-human-imagelabels.csv": csv_of(
            labels,
            [
                (IDS[0], "verification", "/m/01", 1),
                (IDS[1], "verification", "/m/02", 1),
                (IDS[0], "crowdsource-verification", "/m/02", 0),
            ],
        ),
        "labels/oidv7-train-annotations-machine-imagelabels.csv": csv_of(
            labels, [(IDS[0], "machine", "/m/01", 0.7)]
        ),
        "oidv6-train-annotations-bbox.csv": csv_of(
            _BOX_COLUMNS, [(IDS[1], "xclick", "/m/02", 1, 0.1, 0.4, 0.2, 0.5, 1, 0, 0, 0, -1)]
        ),
    }


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz"])
def test_openimages_keeps_attribution_labels_boxes_and_turns_the_pixels(
    photographs, tmp_path, data_prep, form
):
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
    known, kept = metadata(out), samples(out)
    for n, i in enumerate(IDS):
        assert (known[i]["license"], known[i]["author"]) == (_BY, 'Ann "A." Lee, Jr.')
        assert known[i]["title"] == "two\nlines, a comma" and known[i]["original_url"].endswith(f"{i}.jpg")
        if i != IDS[1]:
            assert kept[i] == photographs[n] and "rotation" not in known[i]
    assert known[IDS[0]]["labels"] == {
        "positive": [["/m/01", "Cat"]],
        "negative": [["/m/02", "Dog"]],
        "machine": [["/m/01", "Cat", 0.7]],
    }
    (box,) = known[IDS[1]]["boxes"]
    assert (box["label"], box["xmin"], box["xmax"], box["ymin"], box["ymax"]) == (
        ["/m/02", "Dog"],
        0.1,
        0.4,
        0.2,
        0.5,
    )
    assert (box["IsOccluded"], box["IsInside"]) == (1, -1)
    assert known[IDS[1]]["rotation"] == 90
    assert np.abs(pixels_of(kept[IDS[1]]) - np.rot90(pixels_of(photographs[1]))).mean() < 5


def test_older_openimages_files_without_rotation_are_read_too(photographs, tmp_path, data_prep):
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
def test_coco_keeps_captions_instances_and_licence(photographs, tmp_path, data_prep, form):
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
    known = metadata(out)
    first, last = known[names[0][:-4]], known[names[-1][:-4]]
    assert first["captions"] == ["photograph 0"] and first["license"]["name"] == "Attribution"
    (instance,) = first["instances"]
    assert (instance["category"], instance["category_id"]) == ("toothbrush", 90)
    assert instance["bbox"] == [1.0, 2.0, 30.5, 40.0] and instance["segmentation"] == [[1, 2, 3, 4, 5, 6]]
    assert (last["captions"], last["instances"], last["width"]) == ([], [], 160)


def test_a_zip_with_unsafe_members_refuses_them(photographs, tmp_path, data_prep):
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


def test_coco_without_images_or_with_damaged_annotations_is_one_line(photographs, tmp_path, data_prep):
    source = write_tree(tmp_path / "src", {"val2017/1.jpg": photographs[0], "train2014.zip": b"PK no zip"})
    write_tree(source, {"annotations/instances_val2017.json": "{"})
    for split, words in (
        ("val", "can't be read"),
        ("test", "no test images"),
        ("train", "damaged or ends early"),
    ):
        done = data_prep("coco", source, tmp_path / "out", "--split", split)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_csv_rows_are_found_wherever_they_stand(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('ImageID,Text\na,1\nb,"x\n""y"", z"\na,2\nc,\na,3\na,4\n')
    table = CsvRows(path, "ImageID")
    assert [row["Text"] for row in table.rows("a")] == ["1", "2", "3", "4"]
    assert table.rows("b") == [{"ImageID": "b", "Text": 'x\n"y", z'}]
    assert table.rows("d") == []
