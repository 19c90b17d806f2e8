"""Damaged input of every kind gives a clear error or a right answer: no crash, no hang, no heap of memory.

11,000 mutated inputs in the suite; SHARDMAE_FUZZ multiplies them (`SHARDMAE_FUZZ=50 pytest -m "soak or not
soak" tests/data_prep/test_fuzz.py` for a night).
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
from data_prep.jpeg import JpegError, walk
from data_prep.pixels import ImageError
from data_prep.shard_file import ShardWriter, read_members
from data_prep.shard_set import (
    Manifest,
    Shard,
    ShardIndex,
    ShardSetError,
    parse_index,
    parse_manifest,
    write_manifest,
)
from data_prep.sources.containers import entries

TIMES = int(os.environ.get("SHARDMAE_FUZZ", "1"))
_INTERESTING = (
    b"\xff",
    b"\0",
    b"\x7f",
    b"\x80",
    b"-1",
    b"99999999999",
    b"\n",
    b" ",
    b"}",
    b'"',
    b"\xff\xff\xff\xff",
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to four bytes flipped, stretches cut, doubled, moved or overwritten."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place, length = chance.randrange(len(changed) + 1), chance.choice((1, 2, 8, 64, 512, 4096))
        match chance.randrange(6):
            case 0 if place < len(changed):
                changed[place] ^= 1 << chance.randrange(8)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = changed[place : place + length]
            case 3:
                word = chance.choice(_INTERESTING)
                changed[place : place + len(word)] = word
            case 4:
                del changed[place:]
            case 5:
                source = chance.randrange(len(changed) + 1)
                changed[place:place] = changed[source : source + length]
    return bytes(changed)


@pytest.fixture(autouse=True)
def bounded_memory():
    """An input of a few kilobytes must not make this process grow by more than 1 GiB."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def shard(tmp_path, photographs):
    """(tar bytes, index bytes, Shard) of five samples with labels and metadata."""
    with open(tmp_path / "s.tar", "wb", buffering=0) as file:
        writer = ShardWriter(file)
        for number in range(5):
            files = [("jpg", photographs[number][:3000]), ("cls", b"%d" % number), ("json", b'{"a":1}')]
            writer.add(f"key_{number}", files)
        digest, index = writer.finish()
    index_digest = hashlib.sha256(index).hexdigest()
    described = Shard("folder-train-000000", 5, writer.bytes, digest, len(index), index_digest)
    return (tmp_path / "s.tar").read_bytes(), index, described


def test_4000_damaged_shard_tars(shard):
    data, _, _ = shard
    whole = list(read_members(io.BytesIO(data), "s.tar"))
    chance = random.Random(1)
    for _ in range(4000 * TIMES):
        try:
            members = list(read_members(io.BytesIO(mutated(data, chance)), "s.tar"))
        except ShardSetError as error:
            assert "s.tar" in str(error)
        else:
            assert len(members) <= 2 * len(whole) and all(m.offset % 512 == 0 for m in members)


def test_3000_damaged_indexes(shard):
    _, index, described = shard
    chance = random.Random(2)
    for _ in range(3000 * TIMES):
        try:
            found = parse_index(mutated(index, chance), described, where="s.idx")
        except ShardSetError as error:
            assert "s.idx" in str(error) and len(str(error)) < 300
        else:
            assert isinstance(found, ShardIndex) and len(found.keys) == 5
            assert (found.offsets + found.sizes <= described.bytes).all() and (found.offsets % 512 == 0).all()


def test_2000_damaged_manifests(shard, tmp_path):
    _, _, described = shard
    fields = {"source": "folder", "split": "train", "seed": 0, "options": {}, "plan_sha256": "0" * 64}
    fields |= {"inputs": 5, "quarantined": 0, "repairs": {}, "classes": ("a", "b"), "class_names": ()}
    manifest = Manifest(format_version=1, **fields, shards=(described,))
    write_manifest(tmp_path, manifest)
    data = (tmp_path / "manifest.json").read_bytes()
    assert parse_manifest(data) == manifest
    chance = random.Random(3)
    for _ in range(2000 * TIMES):
        changed = mutated(data, chance)
        try:
            found = parse_manifest(changed, "m.json")
        except ShardSetError as error:
            assert "m.json" in str(error) and len(str(error)) < 300
        else:
            assert found.num_samples == json.loads(changed)["samples"]
    for hostile in (b"[" * 100_000, b"9" * 10_000, b'{"a":' * 50_000, b"", b"null", b"\xff\xfe{}"):
        with pytest.raises(ShardSetError):
            parse_manifest(hostile)


def test_1000_damaged_source_archives(photographs, tmp_path):
    files = {f"a/{number}.jpg": photographs[number][:600] for number in range(6)}
    files["a/" + "long" * 40 + ".jpg"] = b"x"  # a pax header
    archives = [tar_of(files), zip_of(files), zip_of(files, method=8), tar_of(files, mode="w:gz")]
    chance = random.Random(4)
    path = tmp_path / "archive"
    for number in range(1000 * TIMES):
        kind = number % 25
        data = mutated(archives[kind % 4 if kind < 4 else kind % 3], chance)
        # indexed_gzip keeps what it learnt of a path, so each gzip has its own
        target = tmp_path / f"{number}.gz" if kind == 3 else path
        target.write_bytes(data)
        try:
            found = list(entries(tmp_path, target.name))
        except UserError as error:
            assert len(str(error)) < 1000
        else:
            assert all(e.location.offset >= 0 and e.location.size >= 0 for e in found)


def test_1000_damaged_images_are_refused_or_come_out_sound(photographs):
    made = [data for data, end in oddities(photographs[7]).values() if not end.startswith("quarantined")]
    chance = random.Random(5)
    policy = Policy(max_pixels=1_000_000)
    for number in range(1000 * TIMES):
        try:
            image = prepare(mutated(made[number % len(made)], chance), policy)
        except ImageError as error:
            assert error.reason.isidentifier()
        else:
            again = prepare(image.data, policy)
            assert again.data == image.data and not again.repairs


@pytest.mark.soak
def test_100000_damaged_jpegs_walk_to_an_end(photographs):
    chance = random.Random(6)
    for number in range(100_000 * TIMES):
        try:
            found = walk(mutated(photographs[number % 40], chance))
        except JpegError as error:
            assert error.reason.isidentifier()
        else:
            assert found.width > 0 and found.height > 0
