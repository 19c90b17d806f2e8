"""Decodes every image of a shard with DALI on the CPU, as training will.

Invariant: every image that DALI refuses is named, and only those: a batch that fails is decoded again in
halves.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.shard_set import Shard, ShardSetError, read_index, tar_path

_BATCH = 64


def undecodable(directory: Path, shard: Shard) -> Iterator[str]:
    """Yields one line for each image. A shard that can't be read yields nothing: others report that."""
    try:
        index = read_index(directory, shard)
        file = open(tar_path(directory, shard), "rb")  # noqa: SIM115 (its errors are ShardSetError's equals here)
    except (ShardSetError, OSError):
        return
    with file:
        for start in range(0, shard.samples, _BATCH):
            batch = []
            for i in range(start, min(start + _BATCH, shard.samples)):
                file.seek(index.offsets[i])
                batch.append((index.keys[i], np.frombuffer(file.read(index.sizes[i]), np.uint8)))
            for key in _refused(batch):
                yield f"{shard.name}: DALI can't decode {key}"


def _refused(batch: list[tuple[str, np.ndarray]]) -> Iterator[str]:
    if _decodes([data for _, data in batch]):
        return
    if len(batch) == 1:
        yield batch[0][0]
        return
    half = len(batch) // 2
    yield from _refused(batch[:half])
    yield from _refused(batch[half:])


def _decodes(images: list[np.ndarray]) -> bool:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, prefetch_queue_depth=1)
    def decode():
        encoded = fn.external_source(lambda: images, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)

    if any(not data.size for data in images):
        return False
    try:
        pipeline = decode()
        pipeline.build()
        pipeline.run()
    except RuntimeError:
        return False
    return True
