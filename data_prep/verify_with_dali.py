"""Decode every image of a shard with DALI on the CPU, as training does.

Invariant: exactly the images that DALI cannot decode are reported; a failing batch is split in halves.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.optional_packages import check_one_dali
from data_prep.shard_set import Shard, ShardSetError, read_index, tar_path

_BATCH = 64


def find_undecodable(directory: Path, shard: Shard) -> Iterator[str]:
    """Yield a line per image that DALI cannot decode. Yields nothing for an unreadable shard.

    Raises:
        UserError: If both DALI packages are installed.
    """
    check_one_dali()
    try:
        index = read_index(directory, shard)
        file = open(tar_path(directory, shard), "rb")  # noqa: SIM115 (closed below)
    except (ShardSetError, OSError):  # find_faults() reports them
        return
    with file:
        for start in range(0, shard.samples, _BATCH):
            batch = []
            for i in range(start, min(start + _BATCH, shard.samples)):
                file.seek(index.offsets[i])
                batch.append((index.keys[i], np.frombuffer(file.read(index.sizes[i]), np.uint8)))
            for key in _find_undecodable_keys(batch):
                yield f"{shard.name}: DALI cannot decode {key}"


def _find_undecodable_keys(batch: list[tuple[str, np.ndarray]]) -> Iterator[str]:
    if _can_decode([data for _, data in batch]):
        return
    if len(batch) == 1:
        yield batch[0][0]
        return
    half = len(batch) // 2
    yield from _find_undecodable_keys(batch[:half])
    yield from _find_undecodable_keys(batch[half:])


def _can_decode(images: list[np.ndarray]) -> bool:
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.types import DALIDataType, DALIImageType

    if any(not data.size for data in images):
        return False
    pipeline = Pipeline(batch_size=len(images), num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(lambda: images, dtype=DALIDataType.UINT8, ndim=1)
        decoded = fn.decoders.image(encoded, output_type=DALIImageType.RGB, adjust_orientation=False)
        pipeline.set_outputs(decoded)
    try:
        pipeline.build()
        pipeline.run()
    except RuntimeError:
        return False
    return True
