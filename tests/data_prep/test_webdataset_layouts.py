"""`adopt` and `webdataset` read the same samples from each layout of WebDataset tars; DALI and webdataset read them."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from shard_contents import samples
from webdataset_layouts import LAYOUTS, Layout, compressed

from data_prep.shard_set import QUARANTINE, read_index, read_manifest
from data_prep.sources.sample import make_key
from data_prep.sources.tar_samples import find_image
from pipeline.data.reader import ShardReader


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory, photographs) -> Layout:
    return LAYOUTS[request.param](tmp_path_factory.mktemp(request.param), photographs)


@pytest.fixture(scope="module")
def adopted(layout, data_prep) -> Layout:
    """The layout after `adopt`."""
    before = _digests(layout.folder)
    done = data_prep("adopt", layout.folder, "--workers", 1, *layout.options)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert _digests(layout.folder) == before, "a tar was modified"
    return layout


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def _reasons(directory: Path) -> Counter:
    return Counter(json.loads(line)["reason"] for line in (directory / QUARANTINE).read_text().splitlines())


def _built_key(key: str) -> str:
    return make_key(f"{unquote(key).removeprefix('./')}.jpg")


def _keys(layout: Layout, reader: ShardReader) -> list[str]:
    """Return the keys in the set's order; with the tar's name if tars repeat each other's keys."""
    keys = [
        (f"{entry.name}/" if layout.folder.name.startswith("duplicate_keys") else "") + key
        for entry in reader.manifest.shards
        for key in read_index(layout.folder, entry).keys
    ]
    assert len(set(keys)) == len(keys)
    return keys


def test_adopt_finds_keys_labels_and_bytes(adopted):
    reader = ShardReader(adopted.folder)
    keys, classes = _keys(adopted, reader), reader.manifest.classes
    images = [
        image.tobytes() for shard, n in enumerate(reader.shard_sizes) for image in reader.read_many(shard, range(n))
    ]
    names = [None] * len(keys)
    if classes:
        names = [classes[label] for shard in range(len(reader.shard_sizes)) for label in reader.labels(shard)]
    assert dict(zip(keys, zip(images, names, strict=True), strict=True)) == adopted.valid
    reencoded = Counter(needs_reencoding=len(adopted.reencoded)) if adopted.reencoded else Counter()
    assert _reasons(adopted.folder) == adopted.rejected + reencoded


def test_webdataset_finds_the_same_samples(layout, tmp_path, data_prep):
    out = tmp_path / "set"
    done = data_prep("webdataset", layout.folder, out, "--workers", 1, *layout.options)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    images, classes = samples(out), read_manifest(out).classes
    assert images.keys() == {_built_key(key) for key in {*layout.valid, *layout.reencoded}}
    labels = samples(out, "cls") if classes else {}
    for key, (data, name) in layout.valid.items():
        built = _built_key(key)
        if key != "broken_exif":
            assert images[built] == data
        assert name == (classes[int(labels[built])] if classes else None)
    assert _reasons(out) == layout.rejected


def test_dali_reads_an_adopted_set_with_its_index(adopted):
    from nvidia.dali import fn, pipeline_def

    shards = read_manifest(adopted.folder).shards

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read():
        return fn.readers.webdataset(
            paths=[str(adopted.folder / f"{shard.name}.tar") for shard in shards],
            index_paths=[str(adopted.folder / f"{shard.name}.idx") for shard in shards],
            ext=["jpg"],
        )

    pipeline = read()
    pipeline.build()
    images = [pipeline.run()[0].at(0).tobytes() for _ in adopted.valid]
    assert sorted(images) == sorted(data for data, _ in adopted.valid.values())


def test_verify_finds_no_fault_and_dali_decodes_every_adopted_image(adopted, data_prep):
    done = data_prep("verify", adopted.folder, "--deep")
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stdout


def test_webdataset_reads_the_adopted_images(adopted):
    """The library reads tars without an index.

    So samples that are in no index are left out here, a truncated tar and a repeated key need a handler, and a sample
    whose members are not neighbors comes in parts.
    """
    import webdataset

    repeats = adopted.folder.name.startswith("duplicate_keys")
    expected = {}
    for shard in read_manifest(adopted.folder).shards:
        for key in read_index(adopted.folder, shard).keys:
            valid = adopted.valid[f"{shard.name}/{key}" if repeats else key]
            expected[str(adopted.folder / f"{shard.name}.tar"), unquote(key)] = valid[0]
    paths, images = sorted({path for path, _ in expected}), {}
    for sample in webdataset.WebDataset(paths, shardshuffle=False, handler=webdataset.ignore_and_continue):
        place, extension = (sample["__url__"], sample["__key__"]), find_image(sample)
        if place in expected and extension is not None:
            images[place] = sample[extension]
    assert images == expected


def test_an_epoch_reads_each_adopted_sample_once(adopted):
    reader = ShardReader(adopted.folder)
    locations = reader.sampler(0).locate(np.arange(reader.num_samples))
    pairs = zip(locations.shard, locations.index_in_shard, strict=True)
    images = sorted(reader.read(*pair).tobytes() for pair in pairs)
    assert images == sorted(data for data, _ in adopted.valid.values())


def test_json_and_text_are_copied(tmp_path, photographs, data_prep):
    folder = tmp_path / "tars"
    folder.mkdir()
    layout = LAYOUTS["shard_writer"](folder, photographs)
    assert data_prep("webdataset", folder, tmp_path / "set").returncode == 0
    texts, metadata = samples(tmp_path / "set", "txt"), samples(tmp_path / "set", "json")
    assert {key: json.loads(data)["id"] for key, data in metadata.items()} == {
        key: int(key[-6:]) for key in layout.valid
    }
    assert texts == {key: f"photo {int(key[-6:])}".encode() for key in layout.valid}


def test_compressed_tars_are_rebuilt_not_adopted(tmp_path, photographs, data_prep):
    folder = tmp_path / "tars"
    folder.mkdir()
    layout = compressed(folder, photographs)
    done = data_prep("adopt", folder)
    assert done.returncode == 2 and "x.tar.gz" in done.stderr and "data_prep webdataset" in done.stderr
    assert data_prep("webdataset", folder, tmp_path / "set").returncode == 0
    labels = samples(tmp_path / "set", "cls")
    found = {key: (data, labels[key].decode()) for key, data in samples(tmp_path / "set").items()}
    assert found == layout.valid
