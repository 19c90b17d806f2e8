"""`verify` reports every fault of a shard set, in any of its files."""

import json

import pytest


@pytest.fixture
def shard_set(image_folder, tmp_path, data_prep):
    data_prep("folder", image_folder, tmp_path / "shards", "--shard-size", 10)
    return tmp_path / "shards"


def _edit(path, change):
    path.write_bytes(change(bytearray(path.read_bytes())))


def _flip_bit(data):
    data[5000] ^= 1
    return data


@pytest.mark.parametrize(
    "name, change, problem",
    [
        ("folder-train-000001.tar", _flip_bit, "sha256"),
        ("folder-train-000001.tar", None, "missing"),
        ("folder-train-000002.tar", lambda data: data[:-512], "bytes"),
        ("folder-train-000000.idx", lambda data: data.replace(b" 512 ", b" 513 "), "sha256"),
        ("folder-train-000000.idx", lambda data: data + b"\n", "bytes"),
        ("quarantine.jsonl", lambda data: b"{}\n", "1 lines, but manifest.json says 0"),
        ("quarantine.jsonl", None, "missing"),
    ],
)
def test_fault_is_one_line_that_names_the_file(shard_set, data_prep, name, change, problem):
    if change is None:
        (shard_set / name).unlink()
    else:
        _edit(shard_set / name, change)
    done = data_prep("verify", shard_set)
    assert done.returncode == 1 and name in done.stdout and problem in done.stdout, done
    assert done.stdout.count("\n") == 1 and not done.stderr


def test_one_run_reports_every_fault(shard_set, data_prep):
    _edit(shard_set / "folder-train-000000.tar", _flip_bit)
    (shard_set / "folder-train-000001.tar").unlink()
    (shard_set / "stray-train-000000.tar").write_bytes(b"")
    lines = data_prep("verify", shard_set).stdout.splitlines()
    assert all(name in line for name, line in zip(("000000.tar", "000001.tar", "stray"), lines, strict=True))


def test_shard_copied_over_another_is_found(shard_set, data_prep):
    document = json.loads((shard_set / "manifest.json").read_text())
    first, second = document["shards"][:2]
    document["shards"][1] = {**first, "name": second["name"]}
    for suffix in (".tar", ".idx"):
        data = (shard_set / (first["name"] + suffix)).read_bytes()
        (shard_set / (second["name"] + suffix)).write_bytes(data)
    assert len(data_prep("verify", shard_set).stdout.splitlines()) == 2, "by content"
    (shard_set / "manifest.json").write_text(json.dumps(document))
    lines = data_prep("verify", shard_set).stdout.splitlines()
    assert len(lines) == 10 and all("is also in folder-train-000000" in line for line in lines), "by key"


def test_damaged_manifest_is_a_user_error(shard_set, data_prep):
    for change, problem in [
        (lambda text: text[:-30], "JSON"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "version 9"),
        (lambda text: text.replace("folder-train-000000", "../../etc/passwd"), "shards.0.name"),
        (lambda text: text.replace('"samples": 10', '"samples": 11', 1), "'samples'"),
        (lambda text: text.replace('"samples": 10', '"samples": 0', 1), "shards.0.samples"),
        (lambda text: text.replace('"seed": 0', '"seed": true'), "seed"),
    ]:
        text = (shard_set / "manifest.json").read_text()
        (shard_set / "manifest.json").write_text(change(text))
        done = data_prep("verify", shard_set)
        assert done.returncode == 2 and "manifest.json" in done.stderr and problem in done.stderr, done
        assert done.stderr.count("\n") == 1
        (shard_set / "manifest.json").write_text(text)


def test_deep_names_an_image_that_dali_cannot_decode(image_folder, tmp_path, data_prep, photographs):
    """A JPEG without Huffman tables has a valid structure, but cannot be decoded."""
    data = photographs[40]
    while (start := data.find(b"\xff\xc4")) > 0:
        data = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]
    (image_folder / "bee" / "bad.jpg").write_bytes(data.replace(b"\xff\xdb", b"\xff\xe5"))
    out = tmp_path / "out"
    data_prep("folder", image_folder, out, "--check", "structure")
    assert data_prep("verify", out).returncode == 0
    done = data_prep("verify", out, "--deep")
    (line,) = done.stdout.splitlines()
    assert done.returncode == 1 and "folder-train-000000" in line and "bee_bad" in line


def test_info_as_json_prints_the_figures(shard_set, data_prep):
    figures = json.loads(data_prep("info", shard_set, "--json").stdout)
    assert (figures["samples"], figures["classes"], figures["shards"]) == (30, 3, 3)
    assert sum(figures["shorter_side"].values()) == sum(figures["labels"].values()) == 30


def test_wids_index_lists_every_shard(shard_set):
    index = json.loads((shard_set / "wids.json").read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert [shard["nsamples"] for shard in index["shardlist"]] == [10, 10, 10]
    assert all((shard_set / s["url"]).stat().st_size == s["filesize"] for s in index["shardlist"])
