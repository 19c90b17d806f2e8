"""ADE20K and data sets in its layout: label maps are stored byte for byte, and bad ones are quarantined."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from file_contents import decode_pixels, encode_image, read_tree
from PIL import Image
from published import write_tree, zip_of
from shard_contents import quarantine, samples

from data_prep.errors import UserError
from data_prep.label_map import check_label_map
from data_prep.pixels import ImageError
from data_prep.shard_set import read_manifest
from data_prep.sources.ade20k import parse_classes

CLASSES = "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t9\t9\twall\n2\t0.1\t9\t9\tbuilding, edifice\n3\t0.1\t9\t9\tsky\n"
TOP = "ADEChallengeData2016"


def size_of(image: bytes) -> tuple[int, int]:
    return decode_pixels(image).shape[1::-1]


def label_map(size: tuple[int, int], top: int = 3, mode: str = "L", seed: int = 0) -> bytes:
    """Return a PNG of blocks of random values up to `top`."""
    width, height = size
    values = np.random.default_rng(seed).integers(0, top + 1, (-(-height // 16), -(-width // 16)), np.uint8)
    values[0, 0] = top
    image = Image.fromarray(values.repeat(16, 0).repeat(16, 1)[:height, :width])
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    return encode_image(image, "PNG")


def data_set(images: list[bytes], split: str = "training") -> dict[str, bytes]:
    """Return the files of a data set in ADE20K's layout, one map of each kind that is allowed in turn."""
    files = {"objectInfo150.txt": CLASSES.encode(), "sceneCategories.txt": b"ADE_train_00000001 airport"}
    for number, image in enumerate(images):
        name = f"ADE_train_{number:08d}"
        files[f"images/{split}/{name}.jpg"] = image
        files[f"annotations/{split}/{name}.png"] = label_map(size_of(image), mode="LP"[number % 2], seed=number)
    return files


@pytest.mark.parametrize("form", ["folder", "folder with top", "zip", "folder with zip"])
def test_label_maps_are_stored_byte_for_byte(photographs, tmp_path, data_prep, form):
    files = data_set(photographs[:5])
    source = tmp_path / "src"
    if form == "folder":
        write_tree(source, files)
    elif form == "folder with top":
        write_tree(source / TOP, files)
    else:
        source.mkdir()
        (source / f"{TOP}.zip").write_bytes(zip_of({f"{TOP}/{name}": data for name, data in files.items()}))
        source = source / f"{TOP}.zip" if form == "zip" else source
    out = tmp_path / "out"
    done = data_prep("ade20k", source, out, "--workers", 2, "--shard-size", 2)
    assert done.returncode == 0 and "5 inputs, 3 classes" in done.stdout, done.stderr
    assert samples(out, "png") == {
        Path(name).stem: data for name, data in files.items() if name.startswith("annotations")
    }
    assert samples(out) == {Path(name).stem: data for name, data in files.items() if name.startswith("images")}
    manifest = read_manifest(out)
    assert (manifest.classes, manifest.annotation) == (("wall", "building, edifice", "sky"), "label_map")
    assert data_prep("verify", out, "--deep").returncode == 0
    figures = json.loads(data_prep("info", out, "--json").stdout)
    assert figures["labels"]["2"] == 5, "every map has the last class"


def test_array_tasks_build_the_same_set(photographs, tmp_path, data_prep):
    source = write_tree(tmp_path / "src", data_set(photographs[:5]))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    data_prep("ade20k", source, alone, "--shard-size", 2)
    for task in (1, 0, 0):
        data_prep("ade20k", source, shared, "--shard-size", 2, "--task-index", task, "--num-tasks", 2)
    assert data_prep("finalize", shared).returncode == 0
    assert read_tree(shared) == read_tree(alone)


def test_bad_label_maps_are_quarantined(photographs, tmp_path, data_prep):
    files = data_set(photographs[:9])
    names = [f"annotations/training/ADE_train_{number:08d}.png" for number in range(9)]
    width, height = size_of(photographs[0])
    gray16 = Image.fromarray(np.ones((size_of(photographs[1])[1], size_of(photographs[1])[0]), np.uint16))
    files[names[0]] = label_map((width, height - 1))
    files[names[1]] = encode_image(gray16, "PNG")
    files[names[2]] = encode_image(Image.new("RGB", size_of(photographs[2])), "PNG")
    files[names[3]] = label_map(size_of(photographs[3]), top=4)
    del files[names[4]]
    files[names[5]] = files[names[5]][:-40]
    files[names[6]] = encode_image(Image.new("L", size_of(photographs[6])), "JPEG")
    files[names[7]] = encode_image(Image.new("1", size_of(photographs[7])), "PNG")
    files["annotations/training/alone.png"] = files[names[8]]
    out = tmp_path / "out"
    done = data_prep("ade20k", write_tree(tmp_path / "src", files), out)
    assert done.returncode == 0, done.stderr
    reasons = ["size", "format", "format", "value", "missing", "damaged", "format", "format"]
    expected = {
        f"images/training/ADE_train_{number:08d}.jpg": f"label_map_{reason}"
        for number, reason in enumerate(reasons)
        if reason != "missing"
    }
    expected["images/training/ADE_train_00000004.jpg"] = "missing_label_map"
    expected["annotations/training/alone.png"] = "missing_image"
    assert quarantine(out) == expected
    assert list(samples(out, "png")) == ["ADE_train_00000008"]
    assert data_prep("verify", out).returncode == 0


@pytest.mark.parametrize("orientation", ["apply", "ignore"])
def test_a_rotated_image_keeps_in_step_with_its_map(photographs, tmp_path, data_prep, orientation):
    """`apply`: the map is that of the upright image, `ignore`: of the stored pixels; the other one is quarantined."""
    exif = Image.Exif()
    exif[0x0112] = 6
    width, height = 160, 96
    stored = Image.fromarray(decode_pixels(photographs[0]).astype(np.uint8)).resize((width, height))
    image = encode_image(stored, "JPEG", quality=95, exif=exif)
    files = {"classes.txt": b"a\nb\nc", "images/training/upright.jpg": image, "images/training/stored.jpg": image}
    files["annotations/training/upright.png"] = label_map((height, width))
    files["annotations/training/stored.png"] = label_map((width, height))
    out = tmp_path / "out"
    done = data_prep("ade20k", write_tree(tmp_path / "src", files), out, "--orientation", orientation)
    assert done.returncode == 0, done.stderr
    kept, rejected = ("upright", "stored") if orientation == "apply" else ("stored", "upright")
    assert quarantine(out) == {f"images/training/{rejected}.jpg": "label_map_size"}
    ((key, built),) = samples(out).items()
    assert key == kept and size_of(built) == ((height, width) if orientation == "apply" else (width, height))


def test_a_changed_label_map_is_another_set(photographs, tmp_path, data_prep):
    source, out = write_tree(tmp_path / "src", data_set(photographs[:2])), tmp_path / "out"
    data_prep("ade20k", source, out)
    write_tree(source, {"annotations/training/ADE_train_00000000.png": label_map(size_of(photographs[0]), seed=9)})
    done = data_prep("ade20k", source, out)
    assert done.returncode == 2 and "annotations" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "files, options, named",
    [
        ({"classes.txt": b"a"}, [], "images/training"),
        ({"images/training/a.jpg": b"x"}, [], "annotations/training"),
        ({"images/training/a.jpg": b"x", "annotations/training/a.png": b"x"}, [], "--classes"),
        (
            data_set([]) | {"images/training/a.jpg": b"x", "annotations/training/a.png": b"x"},
            ["--resize", 64],
            "--resize",
        ),
        (data_set([]) | {"images/training/a.jpg": b"x", "annotations/training/a.png": b"x"}, ["--classes", "no"], "no"),
    ],
)
def test_unusable_sources_are_one_line_errors(tmp_path, data_prep, files, options, named):
    done = data_prep("ade20k", write_tree(tmp_path / "src", files), tmp_path / "out", *options)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["wall\nbuilding, edifice\nsky", "1\twall\n2\tbuilding, edifice\r\n3\tsky\n\n", CLASSES]
)
def test_class_lists_may_have_any_published_form(text):
    assert parse_classes(text, "file") == ("wall", "building, edifice", "sky")


def test_the_csv_of_ade20k_is_a_class_list():
    text = "Idx,Ratio,Train,Val,Stuff,Name\n1,0.15,11664,1172,1,wall\n2,0.1,6046,612,1,building;edifice\n"
    assert parse_classes(text, "file") == ("wall", "building;edifice")


@pytest.mark.parametrize("text", ["", "a\nb\na", "1\ta\n3\tb", "0\ta\n1\tb", "\n".join(map(str, range(256)))])
def test_wrong_class_lists_are_errors(text):
    with pytest.raises(UserError, match="file"):
        parse_classes(text, "file")


def test_a_header_with_a_huge_size_is_not_decoded():
    header = struct.pack(">IIBBBBB", 1 << 30, 1 << 30, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ImageError) as error:
        check_label_map(data, 64, 64, 3)
    assert error.value.reason == "label_map_size"


@pytest.mark.skipif("ADE_DIR" not in os.environ, reason="ADE_DIR is not set")
def test_a_published_data_set_is_built_completely(tmp_path, data_prep):
    source = Path(os.environ["ADE_DIR"])
    out = tmp_path / "out"
    done = data_prep("ade20k", source, out, "--split", "validation", "--classes", source / "classes.txt")
    assert done.returncode == 0, done.stderr
    maps = {path.stem: path.read_bytes() for path in (source / "annotations/validation").iterdir()}
    assert samples(out, "png") == maps and not quarantine(out)
    assert len(read_manifest(out).classes) == 129
