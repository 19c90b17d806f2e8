"""JPEGs damaged in a shard set, so that `verify` was right when it passed."""

from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.shard_set import read_index, read_manifest, tar_path


def find_frame(data: bytearray) -> tuple[int, int]:
    """Return start and end of the frame header."""
    start = next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
    return start, start + 2 + (data[start + 2] << 8 | data[start + 3])


def no_tables(data: bytearray) -> None:
    """Hide the quantization tables: the size can be read, and only decoding fails."""
    while b"\xff\xdb" in data[: find_frame(data)[0]]:
        data[data.index(b"\xff\xdb") + 1] = 0xEF


def damage_samples(
    shards: Path, samples: Iterable[tuple[int, int]], how: Callable[[bytearray], None] = no_tables
) -> list[str]:
    """Damage samples (shard, index) in place. Returns their keys."""
    keys = []
    for number, i in samples:
        shard = read_manifest(shards).shards[number]
        index = read_index(shards, shard)
        with open(tar_path(shards, shard), "r+b") as file:
            file.seek(index.offsets[i])
            data = bytearray(file.read(index.sizes[i]))
            how(data)
            file.seek(index.offsets[i])
            file.write(data)
        keys.append(index.keys[i])
    return keys
