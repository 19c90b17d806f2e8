"""`python -m data_prep parquet`: files that the `datasets` library writes."""

import io
import subprocess
import sys

import numpy as np
import pytest
from file_contents import read_tree
from PIL import Image
from shard_contents import class_of, quarantine, samples

from data_prep.shard_set import read_manifest

NAMES = ["tench", "goldfish", "great white shark"]  # in the order of the labels, which is not the alphabet's


def write(path, photographs, labels=None, paths=None, names=NAMES, columns=None):
    """Write a file as the datasets library does, in row groups of four rows."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    paths = paths or [None] * len(photographs)
    images = [data and {"bytes": data, "path": name} for data, name in zip(photographs, paths, strict=True)]
    features = {"image": ImageFeature()}
    content = {"image": images}
    if labels is not None:
        features["label"] = ClassLabel(names=names)
        content["label"] = labels
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(content, features=Features(features)).to_parquet(path, batch_size=4)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, photographs):
    """A data set of two train files and a test file, in the layout of the Hugging Face hub."""
    root = tmp_path_factory.mktemp("parquet") / "data"
    for number in range(2):
        part = photographs[10 * number : 10 * number + 10]
        write(root / f"train-0000{number}-of-00002.parquet", part, [i % 3 for i in range(10)])
    write(root / "test-00000-of-00001.parquet", photographs[20:24], [-1] * 4)
    return root


def test_images_labels_and_class_names(files, tmp_path, photographs, data_prep):
    import pyarrow.parquet as pq

    assert pq.ParquetFile(files / "train-00000-of-00002.parquet").num_row_groups > 1
    out = tmp_path / "set"
    done = data_prep("parquet", files.parent, out, "--shard-size", 7)
    assert done.returncode == 0, done.stderr
    manifest, classes = read_manifest(out), class_of(out)
    assert manifest.classes == tuple(NAMES) and (manifest.source, manifest.num_samples) == ("parquet", 20)
    expected = {f"data_train-0000{i // 10}-of-00002_{i % 10:06d}": data for i, data in enumerate(photographs[:20])}
    assert samples(out) == expected
    assert classes == {key: NAMES[i % 10 % 3] for i, key in enumerate(expected)}
    assert data_prep("verify", out).returncode == 0 and not (out / ".build").exists()


def test_a_split_without_labels(files, tmp_path, photographs, data_prep):
    assert data_prep("parquet", files, tmp_path / "set", "--split", "test").returncode == 0
    assert read_manifest(tmp_path / "set").classes == ()
    assert sorted(samples(tmp_path / "set").values()) == sorted(photographs[20:24])


def test_paths_that_differ_are_the_keys(tmp_path, photographs, data_prep):
    write(tmp_path / "x.parquet", photographs[:3], [0, 1, 2], [f"a/n01440764_{i}.JPEG" for i in range(3)])
    data_prep("parquet", tmp_path / "x.parquet", tmp_path / "set")
    assert set(samples(tmp_path / "set")) == {f"n01440764_{i}" for i in range(3)}
    write(tmp_path / "y.parquet", photographs[:3], [0, 1, 2], ["image.jpg"] * 3)
    data_prep("parquet", tmp_path / "y.parquet", tmp_path / "other")
    assert set(samples(tmp_path / "other")) == {f"y_00000{i}" for i in range(3)}


def test_unusable_rows_are_quarantined(tmp_path, photographs, data_prep):
    images = [photographs[0], None, photographs[1][:-700], photographs[2], photographs[3]]
    write(tmp_path / "x.parquet", images, [0, 1, 2, -1, None])
    data_prep("parquet", tmp_path / "x.parquet", tmp_path / "set")
    expected = {"row 1": "empty", "row 2": "truncated", "row 3": "no_class", "row 4": "no_class"}
    assert quarantine(tmp_path / "set") == expected and len(samples(tmp_path / "set")) == 1


def test_binary_column_and_text_labels(tmp_path, photographs, data_prep):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for binary in (pa.binary(), pa.large_binary()):
        table = pa.table({"img": pa.array(photographs[:4], binary), "species": ["bee", "ant", "bee", "bee"]})
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
        out = tmp_path / str(binary)
        assert data_prep("parquet", tmp_path / "x.parquet", out, "--label-column", "species").returncode == 0
        assert class_of(out) == {"x_000000": "bee", "x_000001": "ant", "x_000002": "bee", "x_000003": "bee"}
        assert sorted(samples(out).values()) == sorted(photographs[:4])


def test_tasks_build_the_same_set(files, tmp_path, data_prep):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    data_prep("parquet", files, alone, "--shard-size", 4)
    for index in (1, 0, 2):
        done = data_prep("parquet", files, shared, "--shard-size", 4, "--task-index", index, "--num-tasks", 3)
        assert done.returncode == 0, done.stderr
    assert data_prep("finalize", shared).returncode == 0
    assert read_tree(shared) == read_tree(alone)


def test_dry_run_and_a_complete_set_stage_nothing(files, tmp_path, data_prep):
    done = data_prep("parquet", files, tmp_path / "set", "--dry-run")
    assert done.returncode == 0 and "20 inputs, 3 classes" in done.stdout and not (tmp_path / "set").exists()
    data_prep("parquet", files, tmp_path / "set")
    before = read_tree(tmp_path / "set")
    assert "already complete" in data_prep("parquet", files, tmp_path / "set").stdout
    assert read_tree(tmp_path / "set") == before


def _two_image_columns(path, photographs):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": photographs[:2], "b": photographs[:2]}), path)


def _no_image_column(path, photographs):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b"]}), path)


def _truncated(path, photographs):
    write(path, photographs[:4], [0] * 4)
    path.write_bytes(path.read_bytes()[:-900])


def _damaged_pages(path, photographs):
    write(path, photographs[:4], [0] * 4)
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil, arguments, name",
    [
        (_two_image_columns, (), "--image-column"),
        (_no_image_column, (), "text"),
        (_truncated, (), "x.parquet"),
        (_damaged_pages, (), "x.parquet"),
        (lambda path, photographs: write(path, photographs[:4]), ("--label-column", "species"), "species"),
        (lambda path, photographs: write(path, photographs[:4]), ("--image-column", "img"), "img"),
        (
            lambda path, photographs: write(path.with_name("train-0.parquet"), photographs[:4]),
            ("--split", "val"),
            "train",
        ),
        (lambda path, photographs: path.with_suffix(".txt").write_text("x"), (), "no parquet files"),
        (lambda path, photographs: path.mkdir(), (), "no parquet files"),
        (lambda path, photographs: write(path, []), (), "empty"),
    ],
)
def test_an_unusable_source_is_one_line(tmp_path, photographs, data_prep, spoil, arguments, name):
    (tmp_path / "in").mkdir()
    spoil(tmp_path / "in" / "x.parquet", photographs)
    done = data_prep("parquet", tmp_path / "in", tmp_path / "set", *arguments)
    (line,) = (line for line in done.stderr.splitlines() if " INFO]" not in line)
    assert done.returncode == 2 and name in line, done.stderr


PEAK = """
import re, resource, sys
from data_prep.__main__ import main
code = main(sys.argv[1:])
own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss may be the parent's
print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


@pytest.mark.soak
@pytest.mark.parametrize("row_group", [100, 10**9])
def test_memory_does_not_grow_with_the_file(tmp_path, row_group):
    """A file of 2 GB takes less than 200 MiB more than one of 20 MB, even if it is a single row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    images = []
    for _ in range(100):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(buffer, "JPEG", quality=90)
        images.append({"bytes": buffer.getvalue(), "path": None})
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    table = pa.table({"image": images}, schema)
    peaks = []
    for hundreds in (3, 330):
        path = tmp_path / f"{hundreds}.parquet"
        whole = pa.concat_tables([table] * hundreds)
        pq.write_table(whole, path, row_group_size=min(row_group, len(whole)), use_dictionary=False)
        command = ["parquet", path, tmp_path / f"set-{hundreds}", "--check", "structure", "--workers", "2"]
        done = subprocess.run([sys.executable, "-c", PEAK, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        print(f"{path.stat().st_size / 1e9:.2f} GB in row groups of {row_group}: peak {peaks[-1]:.0f} MiB")
    assert peaks[1] - peaks[0] < 200
