"""`verify` names each fault of a shard set, whichever file it is in."""

import json

import pytest


@pytest.fixture
def whole_set(image_folder, tmp_path, data_prep):
    data_prep("folder", image_folder, tmp_path / "shards", "--shard-size", 10)
    return tmp_path / "shards"


def _edit(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


def _flip(data):
    data[5000] ^= 1
    return data


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("folder-train-000001.tar", _flip, "folder-train-000001.tar is damaged (its sha256"),
        ("folder-train-000001.tar", None, "folder-train-000001.tar is missing"),
        ("folder-train-000002.tar", lambda data: data[:-512], "folder-train-000002.tar has"),
        (
            "folder-train-000000.idx",
            lambda data: data.replace(b" 512 ", b" 513 "),
            "000000.idx is not the index",
        ),
        ("folder-train-000000.idx", lambda data: data + b"\n", "folder-train-000000.idx has"),
        ("quarantine.jsonl", lambda data: b"{}\n", "quarantine.jsonl has 1 lines, the manifest says 0"),
        ("quarantine.jsonl", None, "quarantine.jsonl is missing"),
    ],
)
def test_a_fault_is_one_line_that_names_the_file(whole_set, data_prep, name, change, words):
    if change is None:
        (whole_set / name).unlink()
    else:
        _edit(whole_set / name, change)
    done = data_prep("verify", whole_set)
    assert done.returncode == 1 and words in done.stdout, done
    assert done.stdout.count("\n") == 1 and not done.stderr


def test_every_fault_is_named_in_one_run(whole_set, data_prep):
    _edit(whole_set / "folder-train-000000.tar", _flip)
    (whole_set / "folder-train-000001.tar").unlink()
    (whole_set / "stray-train-000000.tar").write_bytes(b"")
    lines = data_prep("verify", whole_set).stdout.splitlines()
    assert [
        words in line for words, line in zip(("000000.tar", "000001.tar", "stray"), lines, strict=True)
    ] == [True] * 3


def test_a_shard_in_the_place_of_another_is_seen_by_content_and_by_key(whole_set, data_prep):
    document = json.loads((whole_set / "manifest.json").read_text())
    first, second = document["shards"][:2]
    document["shards"][1] = {**first, "name": second["name"]}
    for suffix in (".tar", ".idx"):
        (whole_set / (second["name"] + suffix)).write_bytes(
            (whole_set / (first["name"] + suffix)).read_bytes()
        )
    assert len(data_prep("verify", whole_set).stdout.splitlines()) == 2
    (whole_set / "manifest.json").write_text(json.dumps(document))
    lines = data_prep("verify", whole_set).stdout.splitlines()
    assert len(lines) == 10 and all("is also in folder-train-000000" in line for line in lines)


def test_a_damaged_manifest_is_exit_2(whole_set, data_prep):
    for change, words in [
        (lambda text: text[:-30], "damaged"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "version 9"),
        (lambda text: text.replace("folder-train-000000", "../../etc/passwd"), "no shard's name"),
        (lambda text: text.replace('"samples": 10', '"samples": 11', 1), "not the sum"),
    ]:
        text = (whole_set / "manifest.json").read_text()
        (whole_set / "manifest.json").write_text(change(text))
        done = data_prep("verify", whole_set)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
        (whole_set / "manifest.json").write_text(text)


def test_deep_names_an_image_that_dali_refuses(image_folder, tmp_path, data_prep, photographs):
    """Structure alone does not see a JPEG without Huffman tables; a decoder does."""
    data = photographs[40]
    stripped = data
    while (start := stripped.find(b"\xff\xc4")) > 0:
        stripped = stripped[:start] + stripped[start + 2 + int.from_bytes(stripped[start + 2 : start + 4]) :]
    (image_folder / "bee" / "bad.jpg").write_bytes(stripped.replace(b"\xff\xdb", b"\xff\xe5"))
    out = tmp_path / "out"
    data_prep("folder", image_folder, out, "--check", "structure")
    assert data_prep("verify", out).returncode == 0
    done = data_prep("verify", out, "--deep")
    assert done.returncode == 1 and done.stdout == "folder-train-000000: DALI can't decode bee_bad\n"


def test_info_as_json_has_the_cards_figures(whole_set, data_prep):
    figures = json.loads(data_prep("info", whole_set, "--json").stdout)
    assert (figures["samples"], figures["classes"], figures["shards"]) == (30, 3, 3)
    assert sum(figures["shorter_side"].values()) == sum(figures["labels"].values()) == 30


def test_the_wids_index_lists_every_shard(whole_set):
    index = json.loads((whole_set / "wids.json").read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert [shard["nsamples"] for shard in index["shardlist"]] == [10, 10, 10]
    assert all((whole_set / s["url"]).stat().st_size == s["filesize"] for s in index["shardlist"])
