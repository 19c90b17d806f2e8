"""Verify that a shard set is what its manifest says.

Invariant: no part of the set is trusted: tar, index and manifest are read independently and compared. A fault
does not stop the verification, so one run reports all of them.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep import shard_set
from data_prep.errors import UserError
from data_prep.jpeg import parse_jpeg
from data_prep.label_map import check_label_map
from data_prep.pixels import ImageError
from data_prep.shard_file import read_members
from data_prep.shard_set import Manifest, Shard, ShardSetError
from data_prep.sources.sample import KEY

_LABEL_LIMIT = 1 << 20  # bytes of a label file


def find_faults(directory: Path, deep: bool = False) -> Iterator[str]:
    """Yield a line per fault of a shard set; none if it is complete and correct.

    Args:
        directory: The shard set.
        deep: Whether to decode every image with DALI, too, and to check every label map against its image.

    Raises:
        ShardSetError: If the manifest cannot be used at all.
    """
    manifest = shard_set.read_manifest(directory)
    keys = array("Q")
    for shard in manifest.shards:
        yield from _shard_faults(directory, manifest, shard, keys)
    if not manifest.is_adopted:  # its tars may repeat each other's keys
        yield from _repeated_keys(directory, manifest, keys)
    if deep:
        from data_prep.verify_with_dali import find_undecodable

        for shard in manifest.shards:
            yield from find_undecodable(directory, shard)
            if manifest.annotation == "label_map":
                yield from _label_map_faults(directory, manifest, shard)
    yield from _quarantine_faults(directory, manifest)
    yield from _unlisted_files(directory, manifest)


def _shard_faults(directory: Path, manifest: Manifest, shard: Shard, keys: array) -> Iterator[str]:
    is_sound = True
    for check in (shard_set.check_shard_bytes, shard_set.read_index):
        try:
            check(directory, shard)
        except ShardSetError as error:
            is_sound = False
            yield str(error)
    path, index = shard_set.tar_path(directory, shard), shard_set.idx_path(directory, shard)
    if not path.exists() or not index.exists():
        return
    try:
        with open(path, "rb") as tar:
            yield from _content_faults(manifest, shard, keys, tar, index)
    except ShardSetError as error:
        if is_sound:  # otherwise the fault is already reported
            yield str(error)
    except OSError as error:
        yield f"{error.filename}: cannot be read: {error.strerror}"


def _content_faults(manifest: Manifest, shard: Shard, keys: array, tar: BinaryIO, index: Path) -> Iterator[str]:
    listed, first_key = [], len(keys)
    tar_bytes = tar.seek(0, os.SEEK_END)
    for files in shard_set.parse_index_lines(index.read_bytes(), shard.samples, tar_bytes, index):
        listed += [(offset, length, name) for _, offset, length, name in files]
        yield from _key_faults(manifest, shard, files, keys)
        yield from _label_faults(tar, manifest, shard, files)
    if manifest.is_adopted:
        is_equal = set(listed) <= _adopted_members(tar) and len(set(keys[first_key:])) == shard.samples
    else:
        is_equal = listed == [(member.offset, member.size, member.name) for member in read_members(tar, tar.name)]
    if not is_equal:
        yield f"{index}: lists other files than {tar.name} holds"


def _adopted_members(tar: BinaryIO) -> set[tuple[int, int, str]]:
    """Return the members of an adopted tar, which may be damaged at its end."""
    from data_prep.sources.containers import tar_entries
    from data_prep.sources.sample import Storage

    members = set()
    try:
        for entry in tar_entries(tar, tar.seek(0, os.SEEK_END), tar.name, Storage.STORED):
            members.add((entry.location.offset, entry.location.size, shard_set.quote_name(entry.stored_name)))
    except UserError:
        pass
    return members


def _key_faults(manifest: Manifest, shard: Shard, files: list, keys: array) -> Iterator[str]:
    names = {shard_set.key_of(name) for _, _, _, name in files}
    key = names.pop()
    if names or not (manifest.is_adopted or KEY.fullmatch(key)):
        yield f"{shard.name}: sample {key!r} has several keys or an invalid one"
    keys.append(_hash(key))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _repeated_keys(directory: Path, manifest: Manifest, keys: array) -> Iterator[str]:
    """Find keys that occur twice. Only hashes are in memory; if two are equal, the indexes are read again."""
    ordered = np.sort(np.asarray(keys))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    shard_of: dict[str, str] = {}
    for shard in manifest.shards if repeated else ():
        try:
            for key in shard_set.read_index(directory, shard).keys:
                if _hash(key) not in repeated:
                    continue
                if key in shard_of:
                    yield f"{shard.name}: key {key!r} is also in {shard_of[key]}"
                shard_of[key] = shard.name
        except ShardSetError:
            continue


def _label_faults(tar: BinaryIO, manifest: Manifest, shard: Shard, files: list) -> Iterator[str]:
    wanted = manifest.label_extension
    labels = [(offset, size) for extension, offset, size, _ in files if extension == wanted]
    name = files[0][3]
    if not manifest.is_adopted and bool(labels) != manifest.has_labels:
        yield f"{shard.name}: {name} has {'a' if labels else 'no'} label, unlike {shard_set.MANIFEST}"
    if not manifest.has_labels:
        return
    offset, size = labels[0] if labels else (0, 0)
    tar.seek(offset)
    text = tar.read(min(size, _LABEL_LIMIT))
    try:
        is_known = 0 <= manifest.read_labels([shard_set.key_of(name)], [text])[0] < len(manifest.classes)
    except ValueError:
        is_known = False
    if not is_known:
        yield f"{shard.name}: label {text[:20]!r} of {name} is none of {len(manifest.classes):,} classes"


def _label_map_faults(directory: Path, manifest: Manifest, shard: Shard) -> Iterator[str]:
    """Find label maps that do not belong to their image or classes. Yields nothing for an unreadable shard."""
    try:
        images, maps = (shard_set.read_index(directory, shard, extension) for extension in ("jpg", "png"))
        tar = open(shard_set.tar_path(directory, shard), "rb")  # noqa: SIM115 (closed below)
    except (ShardSetError, OSError):  # _shard_faults() reports them
        return
    with tar:
        for i, key in enumerate(images.keys):
            image, label_map = (_read_at(tar, index.offsets[i], index.sizes[i]) for index in (images, maps))
            try:
                info = parse_jpeg(image)
                check_label_map(label_map, info.width, info.height, len(manifest.classes))
            except ImageError as error:
                yield f"{shard.name}: {key}: {error}"


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _quarantine_faults(directory: Path, manifest: Manifest) -> Iterator[str]:
    path = directory / shard_set.QUARANTINE
    entries = _read_quarantine(directory)
    if entries is None:
        yield f"{path}: {'damaged' if path.exists() else 'missing'}"
        return
    if len(entries) != manifest.quarantined:
        yield f"{path}: {len(entries):,} lines, but {shard_set.MANIFEST} says {manifest.quarantined:,}"
    if manifest.num_samples + manifest.quarantined != manifest.inputs:
        yield f"{directory / shard_set.MANIFEST}: samples and quarantined inputs do not add up to the inputs"


def _read_quarantine(directory: Path) -> list[dict[str, str]] | None:
    try:
        with open(directory / shard_set.QUARANTINE, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError):
        return None


def _unlisted_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Find shards that the manifest does not list; loaders that go by file names would read them."""
    known = {f"{shard.name}{suffix}" for shard in manifest.shards for suffix in (".tar", ".idx")}
    if manifest.is_adopted:  # tars without a usable sample are in the quarantine only
        known |= {entry["source"] for entry in _read_quarantine(directory) or ()}
    for name in sorted(os.listdir(directory)):
        is_hidden = manifest.is_adopted and name.startswith(".")  # macOS's "._x.tar"
        if name.endswith((".tar", ".idx")) and name not in known and not is_hidden:
            yield f"{directory / name}: not in {shard_set.MANIFEST}"
    if (directory / shard_set.BUILD_DIRECTORY).exists():
        yield f"{directory / shard_set.BUILD_DIRECTORY}: left over; run the build again to remove it"
