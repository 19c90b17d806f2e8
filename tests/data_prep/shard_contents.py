"""Read a shard set through its manifest and indexes."""

import json
from pathlib import Path

from data_prep.shard_set import QUARANTINE, read_index, read_manifest, tar_path


def samples(directory: Path, extension: str = "jpg") -> dict[str, bytes]:
    """Return key -> content of the sample's file, in the set's order."""
    contents = {}
    for shard in read_manifest(directory).shards:
        index = read_index(directory, shard, extension)
        data = tar_path(directory, shard).read_bytes()
        for key, offset, size in zip(index.keys, index.offsets, index.sizes, strict=True):
            contents[key] = data[offset : offset + size]
    return contents


def metadata(directory: Path) -> dict[str, dict]:
    return {key: json.loads(data) for key, data in samples(directory, "json").items()}


def class_of(directory: Path) -> dict[str, str]:
    classes = read_manifest(directory).classes
    return {key: classes[int(label)] for key, label in samples(directory, "cls").items()}


def quarantine(directory: Path) -> dict[str, str]:
    """Return input (its name in the archive, or its path) -> reason."""
    entries = [json.loads(line) for line in (directory / QUARANTINE).read_text().splitlines()]
    return {entry["member"] or entry["source"]: entry["reason"] for entry in entries}
