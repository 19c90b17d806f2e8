"""OpenImages and COCO metadata with other encodings, missing parts, and rows or annotations of other images."""

import json
from pathlib import Path

import pytest
from published import coco_annotations, csv_of, write_tree
from shard_contents import metadata

from data_prep.errors import UserError
from data_prep.sources.coco import CocoSource
from data_prep.sources.csv_rows import ROW_LIMIT, CsvRows
from data_prep.sources.openimages import OpenImagesSource

IDS = ("000a1249af2bc5f0", "0001eeaf4aed83f9", "00075905539074f2", "0000b86e2fd18333")
IMAGES = {f"train/{i}.jpg": b"" for i in IDS}
ROWS = [(i, f"https://flickr/{i}", "https://by", 'Zoë "Z", Lee', "90.0") for i in IDS]
COLUMNS = "ImageID,OriginalURL,License,Author,Rotation"
TABLE = csv_of(COLUMNS, ROWS)
BOXES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax"


def _open(folder: Path, **tables: str | bytes) -> tuple[OpenImagesSource, list[str]]:
    """Open a train split with these tables; returns it and the notes of its plan."""
    write_tree(folder, IMAGES | {f"train-{name}.csv": table for name, table in tables.items()})
    source = OpenImagesSource(folder, "train")
    list(source.samples())
    return source, source.notes()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_openimages_tables_in_other_encodings_are_read(tmp_path, encoding, separator):
    lines = [separator.join(f'"{field}"' for field in TABLE.splitlines()[0].split(","))]
    lines += [separator.join(f'"{field}"'.replace('"Z"', '""Z""') for field in row) for row in ROWS]
    source, notes = _open(tmp_path, images="\r\n".join(lines).encode(encoding))
    for key in IDS:
        details = source.details(key)
        assert details.metadata is not None and details.rotation == 90
        assert (details.metadata["author"], details.metadata["license"]) == ('Zoë "Z", Lee', "https://by")
    assert notes == ["metadata of 4 images: 4 attribution, 0 boxes, 0 labels"]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (TABLE.replace("000", "1"), "0 of the 4 images"),  # other ids
        (csv_of(COLUMNS, [(int(key, 16), *row) for key, *row in ROWS]), "0 of the 4 images"),  # decimal ids
        (TABLE.partition("\n")[2], "header"),
        (TABLE.replace("License", "Licence"), "License"),
        (TABLE.replace("ImageID", "ImageId"), "ImageID"),
        (csv_of(BOXES.removesuffix(",YMax"), []), "YMax"),
        (TABLE.splitlines()[0], "0 of the 4 images"),
        ("", "header"),
        ("<!DOCTYPE html>\n<html>Sign in</html>", "header"),
        (b"\x1f\x8b\x08" + bytes(range(256)) * 9, "header"),
        (b"\0A" + b"\xd8\0" * 500, "no CSV"),
        (TABLE.splitlines()[0] + "\nnothing" * 9, "9 truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_openimages_tables_of_no_use_are_user_errors(tmp_path, table, problem):
    with pytest.raises(UserError, match=r"train-images\.csv: ") as error:
        _open(tmp_path, images=table)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_other_tables_of_openimages_are_named_as_unused(tmp_path):
    points = csv_of("ImageId,X,Y,Label", [(IDS[0], 0.1, 0.2, "/m/01")])
    (tmp_path / "train-folder.csv").mkdir()
    _, notes = _open(tmp_path, images=TABLE, points=points)
    assert any("train-points.csv: not used" in note for note in notes)


def test_openimages_plan_is_an_error_for_ids_of_other_images(tmp_path, data_prep):
    source = write_tree(tmp_path / "src", IMAGES | {"train-images.csv": TABLE.replace("000", "1")})
    done = data_prep("openimages", source, tmp_path / "out", "--dry-run")
    assert done.returncode == 2 and "train-images.csv: " in done.stderr and done.stderr.count("\n") == 1


def test_incomplete_rows_of_openimages_are_left_out_and_counted(photographs, tmp_path, data_prep):
    whole = (IDS[0], "xclick", "/m/02", 1, 0.1, 0.4, 0.2, 0.5)
    boxes = [whole, (*whole[:4], "", *whole[5:]), (*whole[:4], "nan", *whole[5:]), (*whole[:7], "half")]
    long = [(IDS[1], "x" * 200_000, "/m/02", 1, 0.1, 0.4, 0.2, 0.5)]
    box_table = csv_of(BOXES, boxes) + f"{IDS[0]},xclick\n" + csv_of(BOXES, [*long, whole]).partition("\n")[2]
    labels = csv_of(
        "ImageID,Source,LabelName,Confidence", [(IDS[0], "machine", "/m/01", ""), (IDS[1], "x", "/m/01", 1)]
    )
    attribution = TABLE.replace("90.0", "left") + f'{IDS[0]},"never closed\n' + f"{IDS[0]},u,l,again,\n"
    source = write_tree(tmp_path / "src", {f"train/{i}.jpg": photographs[n] for n, i in enumerate(IDS)})
    write_tree(source, {"train-bbox.csv": box_table, "train-labels.csv": labels, "train-images.csv": attribution})
    done = data_prep("openimages", source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "train-bbox.csv: rows left out: 1 too_long, 1 truncated" in done.stdout
    assert "train-images.csv: rows left out: 1 unclosed_quote" in done.stdout
    details = metadata(tmp_path / "out")
    assert [box["xmin"] for box in details[IDS[0]]["boxes"]] == [0.1, 0.1] and details[IDS[1]]["boxes"] == []
    assert details[IDS[0]]["labels"]["machine"] == [] and details[IDS[1]]["labels"]["positive"] == [["/m/01", ""]]
    assert details[IDS[0]]["author"] == "again" and details[IDS[1]]["author"] == 'Zoë "Z", Lee'
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["unreadable"] == {"box_row": 3, "label_row": 1, "rotation": 4}
    assert all(f"{count} {name}" in done.stderr for name, count in card["unreadable"].items())


def test_a_row_above_the_limit_hides_no_other_row(tmp_path):
    path = tmp_path / "rows.csv"
    long = "x" * (ROW_LIMIT + 10)
    good = {"a": "1", "e": "2", "g": "3", "h": "4", "i": "x\u2028y", "j": "6"}
    first, second, *others = (f"{key},{text}\n" for key, text in good.items())
    bad = f'b,{long}\nc,"{long}"\nd,"{long[:-20]}\n{long}"\n'
    path.write_text(f'ImageID,Text\n{first}{bad}{second}\nf,5" disk\n{"".join(others)}')
    table = CsvRows(path, "ImageID")
    assert {key: table.rows(key) for key in good} == {k: [{"ImageID": k, "Text": text}] for k, text in good.items()}
    assert not any(table.rows(key) for key in "bcdf") and table.skipped == {"too_long": 3, "unclosed_quote": 2}


NAMES = [f"{n:012d}.jpg" for n in (139, 285, 632)]


def _coco(folder: Path, change) -> tuple[CocoSource, list[str]]:
    """Open three images whose annotation tables (the last image has none) were changed; returns it and its notes."""
    files: dict[str, bytes | str] = {f"val2017/{name}": b"" for name in NAMES}
    for name, content in coco_annotations(NAMES).items():
        table = json.loads(content)
        change(table)
        files[name] = json.dumps(table)
    source = CocoSource(write_tree(folder, files), "val")
    list(source.samples())
    return source, source.notes()


@pytest.mark.parametrize("prefix", ["", "val2017/", "images\\val2017\\", "/data/"])
def test_coco_annotations_are_found_by_base_name(tmp_path, prefix):
    def move(table):
        for image in table["images"]:
            image["file_name"] = prefix + image["file_name"]

    source, (note,) = _coco(tmp_path, move)
    details = source.details(NAMES[0][:-4]).metadata
    assert details is not None and details["captions"] == ["photograph 0"] and len(details["instances"]) == 1
    assert note == "annotation files: they list 3 of 3 images, 2 of them with annotations"


def test_annotations_of_all_ids_of_a_coco_image_are_joined(tmp_path):
    def repeat(table):
        table["images"].append({**table["images"][0], "id": 7})
        table["annotations"].append({**table["annotations"][0], "image_id": 7, "caption": "again", "area": 5.0})
        if "categories" in table:
            del table["annotations"][-1]["caption"]

    source, notes = _coco(tmp_path, repeat)
    details = source.details(NAMES[0][:-4]).metadata
    assert details is not None and details["captions"] == ["photograph 0", "again"]
    assert [instance["area"] for instance in details["instances"]] == [9.0, 5.0]
    assert any("file names with several image ids" in note and note.endswith(": 1") for note in notes)


def test_coco_images_with_one_base_name_are_an_error(tmp_path):
    def collide(table):
        table["images"][0]["file_name"], table["images"][1]["file_name"] = f"a/{NAMES[0]}", f"b/{NAMES[0]}"

    with pytest.raises(UserError, match=rf"a/{NAMES[0]} and b/{NAMES[0]}"):
        _coco(tmp_path, collide)


def test_coco_annotations_of_other_images_are_an_error(tmp_path, data_prep):
    def rename(table):
        for image in table["images"]:
            image["file_name"] = "COCO_val2014_" + image["file_name"]

    with pytest.raises(UserError, match="list no image of val2017"):
        _coco(tmp_path / "src", rename)
    done = data_prep("coco", tmp_path / "src", tmp_path / "out", "--split", "val", "--dry-run")
    assert done.returncode == 2 and "COCO_val2014" in done.stderr and done.stderr.count("\n") == 1
