"""Proves that a shard set is what its manifest says.

Invariant: verify trusts no part of the set: tar, index and manifest are each read by themselves and compared.
It goes on after a fault, so that one run names them all.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.shard_file import KEY, read_members
from data_prep.shard_set import (
    BUILD_DIRECTORY,
    MANIFEST,
    QUARANTINE,
    Manifest,
    Shard,
    ShardSetError,
    check_shard_bytes,
    idx_path,
    parse_index_lines,
    read_index,
    read_manifest,
    tar_path,
)


def find_faults(directory: Path, deep: bool = False) -> Iterator[str]:
    """Yields one line for each fault that is found; nothing for a set that is whole and true. deep: decode
    every image with DALI.

    Raises ShardSetError when the manifest can't be used at all.
    """
    manifest = read_manifest(directory)
    keys = array("Q")
    for shard in manifest.shards:
        yield from _shard_faults(directory, manifest, shard, keys)
    yield from _repeated_keys(directory, manifest, keys)
    if deep:
        from data_prep.verify_with_dali import undecodable

        for shard in manifest.shards:
            yield from undecodable(directory, shard)
    yield from _quarantine_faults(directory, manifest)
    yield from _stray_files(directory, manifest)


def _shard_faults(directory: Path, manifest: Manifest, shard: Shard, keys: array) -> Iterator[str]:
    sound = True
    for check in (check_shard_bytes, read_index):
        try:
            check(directory, shard)
        except ShardSetError as error:
            sound = False
            yield str(error)
    if not tar_path(directory, shard).exists() or not idx_path(directory, shard).exists():
        return
    try:
        with open(tar_path(directory, shard), "rb") as tar:
            yield from _content_faults(directory, manifest, shard, keys, tar)
    except ShardSetError as error:
        if sound:  # otherwise it only says once more what was said above
            yield str(error)
    except OSError as error:
        yield f"{error.filename} can't be read: {error.strerror}"


def _content_faults(
    directory: Path, manifest: Manifest, shard: Shard, keys: array, tar: BinaryIO
) -> Iterator[str]:
    """Raises ShardSetError and OSError."""
    index = idx_path(directory, shard)
    members = [(member.offset, member.size, member.name) for member in read_members(tar, tar.name)]
    listed = []
    for files in parse_index_lines(index.read_bytes(), shard.samples, tar.seek(0, os.SEEK_END), index):
        listed += [(offset, length, name) for _, offset, length, name in files]
        yield from _key_faults(shard, files, keys)
        yield from _label_faults(tar, manifest, shard, files)
    if listed != members:
        yield f"{index} lists other files than {tar.name} holds"


def _key_faults(shard: Shard, files: list, keys: array) -> Iterator[str]:
    names = {name.removesuffix("." + extension) for extension, _, _, name in files}
    key = names.pop()
    if names or not KEY.fullmatch(key):
        yield f"{shard.name}: sample {key!r} is no single, well-formed key"
    keys.append(_hash(key))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _repeated_keys(directory: Path, manifest: Manifest, keys: array) -> Iterator[str]:
    """Eight bytes a key are kept; only when two are equal are the indexes read again for the names."""
    ordered = np.sort(np.asarray(keys))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[str, str] = {}
    for shard in manifest.shards if suspects else ():
        try:
            for key in read_index(directory, shard).keys:
                if _hash(key) not in suspects:
                    continue
                if key in seen:
                    yield f"{shard.name}: key {key!r} is also in {seen[key]}"
                seen[key] = shard.name
        except ShardSetError:
            continue


def _label_faults(tar: BinaryIO, manifest: Manifest, shard: Shard, files: list) -> Iterator[str]:
    labels = [(offset, size) for extension, offset, size, _ in files if extension == "cls"]
    name = files[0][3]
    if bool(labels) != bool(manifest.classes):
        yield f"{shard.name}: {name} has {'a' if labels else 'no'} label, against the manifest"
    for offset, size in labels:
        tar.seek(offset)
        text = tar.read(min(size, 20))
        if not text.isdigit() or int(text) >= len(manifest.classes):
            yield f"{shard.name}: the label of {name}, {text!r}, is none of {len(manifest.classes):,} classes"


def _quarantine_faults(directory: Path, manifest: Manifest) -> Iterator[str]:
    path = directory / QUARANTINE
    try:
        with open(path, encoding="utf-8") as file:
            entries = [json.loads(line) for line in file]
    except FileNotFoundError:
        yield f"{path} is missing"
        return
    except (OSError, ValueError):
        yield f"{path} is damaged"
        return
    if len(entries) != manifest.quarantined:
        yield f"{path} has {len(entries):,} lines, the manifest says {manifest.quarantined:,}"
    if manifest.num_samples + manifest.quarantined != manifest.inputs:
        yield f"{directory / MANIFEST}: samples and quarantined inputs don't add up to the inputs"


def _stray_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    """A shard that the manifest does not list would be read by any loader that goes by file names."""
    known = {f"{shard.name}{suffix}" for shard in manifest.shards for suffix in (".tar", ".idx")}
    for name in sorted(os.listdir(directory)):
        if name.endswith((".tar", ".idx")) and name not in known:
            yield f"{directory / name} is not in the manifest"
    if (directory / BUILD_DIRECTORY).exists():
        yield f"{directory / BUILD_DIRECTORY} is left over; the build command, run again, removes it"
