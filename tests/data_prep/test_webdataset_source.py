"""`python -m data_prep webdataset`: forms of SRC, labels, repairs, and what is an error."""

import pytest
from file_contents import encode_image, read_tree
from http_store import serve
from PIL import Image
from published import tar_of
from shard_contents import class_of, quarantine, samples

from data_prep.shard_set import read_manifest


@pytest.fixture
def tars(tmp_path, photographs):
    """Tars 0 to 3 of four photographs each, in two classes."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(4):
        files = {}
        for i in range(4):
            key = f"{number}{i}"
            files |= {
                f"{key}.jpg": photographs[4 * number + i],
                f"{key}.cls": (b"bee", b"ant")[i % 2],
                f"{key}.txt": b"t",
            }
        (folder / f"{number:03d}.tar").write_bytes(tar_of(files))
    return folder


def test_folder_pattern_and_url_build_the_same_set(tars, tmp_path, data_prep):
    assert data_prep("webdataset", tars, tmp_path / "folder", "--shard-size", 5).returncode == 0
    expected = read_tree(tmp_path / "folder")
    assert read_manifest(tmp_path / "folder").classes == ("ant", "bee")
    with serve(tars) as store:
        store.fail(".tar", "error", times=1)  # is tried again
        for name, source in {
            "pattern": f"{tars}/{{000..003}}.tar",
            "file": f"file://{tars}/{{000,001,002,003}}.tar",
            "url": f"{store.url}/{{000..003}}.tar",
        }.items():
            done = data_prep("webdataset", source, tmp_path / name, "--shard-size", 5, "--workers", 1)
            assert done.returncode == 0, done.stderr
            assert read_tree(tmp_path / name) == expected


def test_one_tar_and_a_part_of_the_tars(tars, tmp_path, data_prep, photographs):
    data_prep("webdataset", tars / "001.tar", tmp_path / "one")
    assert samples(tmp_path / "one") == {f"1{i}": photographs[4 + i] for i in range(4)}
    data_prep("webdataset", f"{tars}/{{001..002}}.tar", tmp_path / "two")
    assert set(samples(tmp_path / "two")) == {f"{n}{i}" for n in (1, 2) for i in range(4)}


def test_repairs_resizes_and_turns(tmp_path, photographs, data_prep):
    png = encode_image(Image.new("RGB", (300, 200), "red"), "PNG")
    (tmp_path / "x.tar").write_bytes(tar_of({"a.png": png, "b.jpg": photographs[0], "c.jpg": photographs[1][:-600]}))
    assert data_prep("webdataset", tmp_path / "x.tar", tmp_path / "set", "--resize", 64).returncode == 0
    manifest = read_manifest(tmp_path / "set")
    assert manifest.repairs == {"png": 1} and set(samples(tmp_path / "set")) == {"a", "b"}
    assert quarantine(tmp_path / "set") == {"c.jpg": "truncated"}


def test_labels_none_and_folders(tmp_path, photographs, data_prep):
    files = {
        f"{name}/{i}.{ending}": data
        for i, name in enumerate(("bee", "ant", "bee"))
        for ending, data in (("jpg", photographs[i]), ("cls", b"7"))
    }
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    data_prep("webdataset", tmp_path / "x.tar", tmp_path / "none", "--labels", "none")
    assert read_manifest(tmp_path / "none").classes == ()
    data_prep("webdataset", tmp_path / "x.tar", tmp_path / "folders", "--labels", "folders")
    assert class_of(tmp_path / "folders") == {"bee_0": "bee", "ant_1": "ant", "bee_2": "bee"}
    data_prep("webdataset", tmp_path / "x.tar", tmp_path / "auto")
    assert read_manifest(tmp_path / "auto").classes == tuple(map(str, range(8)))


def test_a_built_set_keeps_its_class_names(image_folder, tmp_path, data_prep):
    data_prep("folder", image_folder, tmp_path / "built")
    assert data_prep("webdataset", tmp_path / "built", tmp_path / "again", "--shard-size", 7).returncode == 0
    assert class_of(tmp_path / "again") == class_of(tmp_path / "built")
    assert samples(tmp_path / "again") == samples(tmp_path / "built")


@pytest.mark.parametrize("length", [0.3, 0.9])
def test_a_truncated_gzip_is_read_as_far_as_possible(tmp_path, photographs, data_prep, length):
    data = tar_of({f"{i}.jpg": photographs[i] for i in range(6)}, mode="w:gz")
    (tmp_path / "x.tar.gz").write_bytes(data[: int(length * len(data))])
    assert data_prep("webdataset", tmp_path / "x.tar.gz", tmp_path / "set").returncode == 0
    images = samples(tmp_path / "set")
    assert images == {str(i): photographs[i] for i in range(len(images))}
    assert quarantine(tmp_path / "set") == {"x.tar.gz": "damaged_tar"}


def test_left_out_members_are_reported(tmp_path, photographs, data_prep):
    (tmp_path / "x.tar").write_bytes(tar_of({"a.jpg": photographs[0], "a.npy": b"1", "a.seg.png": b"2"}))
    done = data_prep("webdataset", tmp_path / "x.tar", tmp_path / "set")
    assert done.returncode == 0 and "1 .npy" in done.stdout and "1 .seg.png" in done.stdout


@pytest.mark.parametrize(
    "source, name",
    [
        ("tars/{000..009}.tar", "004.tar"),
        ("tars/{000..003.tar", "{000..003.tar"),
        ("nowhere", "nowhere"),
        ("nosuch://host/{0..1}.tar", "nosuch"),
        ("page.tar", "page.tar"),
    ],
)
def test_an_unusable_source_is_one_line(tars, tmp_path, data_prep, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.tar").write_text("<html>" * 200)
    done = data_prep("webdataset", source, tmp_path / "set")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and name in lines[-1] and lines[-1].startswith("data_prep: error"), done.stderr
    assert not (tmp_path / "set").exists() and "Traceback" not in done.stderr


def test_a_missing_url_is_one_line(tars, tmp_path, data_prep):
    with serve(tars) as store:
        done = data_prep("webdataset", f"{store.url}/{{002..004}}.tar", tmp_path / "set")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "004.tar" in done.stderr, done.stderr
