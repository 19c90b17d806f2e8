"""Corruption of shard sets that no check before training can detect."""

import hashlib
import json
from pathlib import Path

from data_prep.shard_set import read_index, read_manifest, tar_path


def make_undecodable(shards: Path, count: int) -> list[str]:
    """Make the first samples of a shard undecodable, with matching checksums. Returns their keys."""
    shard = read_manifest(shards).shards[0]
    index, path = read_index(shards, shard), tar_path(shards, shard)
    data = bytearray(path.read_bytes())
    for offset, size in zip(index.offsets[:count], index.sizes[:count], strict=True):
        scan = data.index(b"\xff\xda", offset, offset + size)
        data[scan : offset + size] = bytes(offset + size - scan)
    path.write_bytes(data)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (shards / "manifest.json").write_text(json.dumps(manifest))
    return index.keys[:count]
