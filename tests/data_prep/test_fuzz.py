"""Damaged input of any kind ends in the documented error or a correct result, in bounded time and memory.

The suite runs 11,000 mutated inputs; SHARDMAE_FUZZ multiplies them, for example for a night:
SHARDMAE_FUZZ=50 pytest -m "soak or not soak" tests/data_prep/test_fuzz.py
"""

import hashlib
import io
import json
import os
import random
import resource

import pytest
from oddities import oddities
from published import tar_of, zip_of

from data_prep.errors import UserError
from data_prep.images import Policy, prepare
from data_prep.jpeg import parse_jpeg
from data_prep.pixels import ImageError
from data_prep.shard_file import ShardWriter, read_members
from data_prep.shard_set import Manifest, Shard, ShardIndex, ShardSetError, parse_index, parse_manifest, write_manifest
from data_prep.sources.containers import iter_entries

TIMES = int(os.environ.get("SHARDMAE_FUZZ", "1"))
_TOKENS = [b"\xff", b"\0", b"\x7f", b"\x80", b"-1", b"99999999999", b"\n", b" ", b"}", b'"', b"\xff\xff\xff\xff"]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Apply one to four mutations: flip a bit; cut, double, move or overwrite a range; truncate."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(changed) + 1), rng.choice((1, 2, 8, 64, 512, 4096))
        match rng.randrange(6):
            case 0 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = changed[place : place + length]
            case 3:
                token = rng.choice(_TOKENS)
                changed[place : place + len(token)] = token
            case 4:
                del changed[place:]
            case 5:
                source = rng.randrange(len(changed) + 1)
                changed[place:place] = changed[source : source + length]
    return bytes(changed)


@pytest.fixture(autouse=True)
def bounded_memory():
    """Limit the growth of this process to 1 GiB."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def shard(tmp_path, photographs):
    """Tar, index and manifest entry of a shard of five samples with labels and metadata."""
    with open(tmp_path / "s.tar", "wb", buffering=0) as file:
        writer = ShardWriter(file)
        for number in range(5):
            files = [("jpg", photographs[number][:3000]), ("cls", b"%d" % number), ("json", b'{"a":1}')]
            writer.add(f"key_{number}", files)
        digest, index = writer.finish()
    index_digest = hashlib.sha256(index).hexdigest()
    entry = Shard("folder-train-000000", 5, writer.bytes, digest, len(index), index_digest)
    return (tmp_path / "s.tar").read_bytes(), index, entry


def test_damaged_tar_is_an_error_or_read_safely(shard):
    data, _, _ = shard
    intact = list(read_members(io.BytesIO(data), "s.tar"))
    rng = random.Random(1)
    for _ in range(4000 * TIMES):
        try:
            members = list(read_members(io.BytesIO(mutate(data, rng)), "s.tar"))
        except ShardSetError as error:
            assert "s.tar" in str(error)
        else:
            assert len(members) <= 2 * len(intact) and all(m.offset % 512 == 0 for m in members)


def test_damaged_index_is_an_error_or_stays_in_the_tar(shard):
    _, index, entry = shard
    rng = random.Random(2)
    for _ in range(3000 * TIMES):
        try:
            parsed = parse_index(mutate(index, rng), entry, where="s.idx")
        except ShardSetError as error:
            assert "s.idx" in str(error) and len(str(error)) < 300
        else:
            assert isinstance(parsed, ShardIndex) and len(parsed.keys) == 5
            assert (parsed.offsets + parsed.sizes <= entry.bytes).all() and (parsed.offsets % 512 == 0).all()


def test_damaged_manifest_is_an_error_or_consistent(shard, tmp_path):
    _, _, entry = shard
    fields = {"source": "folder", "split": "train", "seed": 0, "options": {}, "plan_sha256": "0" * 64}
    fields |= {"inputs": 5, "quarantined": 0, "repairs": {}, "classes": ("a", "b"), "class_names": ()}
    manifest = Manifest(format_version=1, **fields, shards=(entry,))
    write_manifest(tmp_path, manifest)
    data = (tmp_path / "manifest.json").read_bytes()
    assert parse_manifest(data) == manifest
    rng = random.Random(3)
    for _ in range(2000 * TIMES):
        changed = mutate(data, rng)
        try:
            parsed = parse_manifest(changed, "m.json")
        except ShardSetError as error:
            assert "m.json" in str(error) and len(str(error)) < 300
        else:
            assert parsed.num_samples == json.loads(changed)["samples"]
    for hostile in (b"[" * 100_000, b"9" * 10_000, b'{"a":' * 50_000, b"", b"null", b"\xff\xfe{}"):
        with pytest.raises(ShardSetError):
            parse_manifest(hostile)


def test_damaged_archive_is_an_error_or_listed_safely(photographs, tmp_path):
    files = {f"a/{number}.jpg": photographs[number][:600] for number in range(6)}
    files["a/" + "long" * 40 + ".jpg"] = b"x"  # a pax header
    archives = [tar_of(files), zip_of(files), zip_of(files, method=8), tar_of(files, mode="w:gz")]
    rng = random.Random(4)
    path = tmp_path / "archive"
    for number in range(1000 * TIMES):
        kind = number % 25
        data = mutate(archives[kind % 4 if kind < 4 else kind % 3], rng)
        # open_gzip caches the index by path, so each gzip needs its own path.
        target = tmp_path / f"{number}.gz" if kind == 3 else path
        target.write_bytes(data)
        try:
            listed = list(iter_entries(tmp_path, target.name))
        except UserError as error:
            assert len(str(error)) < 1000
        else:
            assert all(e.location.offset >= 0 and e.location.size >= 0 for e in listed)


def test_damaged_image_is_rejected_or_repaired(photographs):
    variants = [data for data, end in oddities(photographs[7]).values() if not end.startswith("quarantined")]
    rng = random.Random(5)
    policy = Policy(max_pixels=1_000_000)
    for number in range(1000 * TIMES):
        try:
            image = prepare(mutate(variants[number % len(variants)], rng), policy)
        except ImageError as error:
            assert error.reason.isidentifier()
        else:
            again = prepare(image.data, policy)
            assert again.data == image.data and not again.repairs


@pytest.mark.soak
def test_damaged_jpeg_is_parsed_to_an_end(photographs):
    rng = random.Random(6)
    for number in range(100_000 * TIMES):
        try:
            info = parse_jpeg(mutate(photographs[number % 40], rng))
        except ImageError as error:
            assert error.reason.isidentifier()
        else:
            assert info.width > 0 and info.height > 0
