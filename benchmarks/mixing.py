"""Measure how well readers mix shards whose samples are sorted by class.

    python benchmarks/mixing.py
    python benchmarks/mixing.py --shards 1024 --batch 1024

Writes a set of tiny samples to a temporary directory, sorted by class. A class fills 1.28 shards, as
ImageNet's 1,281 images per class do in shards of 1,000. Each reader then reads one epoch.

    travel        mean distance of a sample from its position in the set, in epochs; 1/3 for a full shuffle
    separation    mean distance of neighbors of the set in the epoch, in epochs
    entropy       mean entropy of the classes in a batch, in bits
    classes       mean number of different classes in a batch
    buffered      encoded samples that the reader holds in memory to mix
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset
from nvidia.dali import fn, pipeline_def

from data_prep.shard_file import ShardWriter
from pipeline.data.sampler import ShardedSampler

SAMPLES_PER_SHARD, SAMPLES_PER_CLASS = 200, 256
WINDOWS = (1, 4, 16, 64)
BUFFERS = (1000, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    total = options.shards * SAMPLES_PER_SHARD
    classes = -(-total // SAMPLES_PER_CLASS)
    print(f"{total:,} samples, {options.shards} shards, {classes} classes; batch {options.batch}\n")
    print("| reader | travel | separation | entropy | classes | buffered |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        tars = write_set(Path(name), options.shards)
        for title, buffered, order in readers(tars, options.shards):
            print("| " + " | ".join([title, *measure(order, total, options.batch), buffered]) + " |", flush=True)


def readers(tars: list[Path], shards: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (title, buffered samples, sample ids of one epoch in the order they are read)."""
    for window in WINDOWS:
        yield f"shardmae, shuffle_window_shards {window}", "0", shardmae(shards, window)
    for buffer in BUFFERS:
        yield f"DALI readers.webdataset, initial_fill {buffer:,}", f"{buffer:,}", dali(tars, buffer)
    for buffer in BUFFERS:
        yield f"webdataset, shardshuffle 100, shuffle({buffer:,})", f"{buffer:,}", webdataset_(tars, buffer)
    total = shards * SAMPLES_PER_SHARD
    yield "full shuffle", f"{total:,}", np.random.default_rng(0).permutation(total)


def shardmae(shards: int, window: int) -> np.ndarray:
    sampler = ShardedSampler(np.full(shards, SAMPLES_PER_SHARD), seed=0, window=window)
    return sampler.locate(np.arange(sampler.num_samples)).sample_id


def dali(tars: list[Path], buffer: int) -> np.ndarray:
    @pipeline_def(batch_size=SAMPLES_PER_SHARD, num_threads=1, device_id=None)
    def webdataset_reader():
        return fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg"],
            random_shuffle=True,
            initial_fill=buffer,
            seed=0,
        )

    pipeline = webdataset_reader()
    pipeline.build()
    batches = [pipeline.run()[0] for _ in range(len(tars))]
    return np.array([parse_number(bytes(np.asarray(item))) for batch in batches for item in batch])


def webdataset_(tars: list[Path], buffer: int) -> np.ndarray:
    dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=100, seed=0)
    return np.array([parse_number(sample["jpg"]) for sample in dataset.shuffle(buffer, rng=random.Random(0))])


def measure(order: np.ndarray, total: int, batch: int) -> list[str]:
    assert sorted(order) == list(range(total)), "the epoch does not contain each sample once"
    position = np.empty(total, np.int64)
    position[order] = np.arange(total)
    travel = np.abs(position - np.arange(total)).mean() / total
    separation = np.abs(np.diff(position)).mean() / total
    entropies, classes = [], []
    for start in range(0, total - batch + 1, batch):
        counts = np.bincount(order[start : start + batch] // SAMPLES_PER_CLASS)
        shares = counts[counts > 0] / batch
        entropies.append(-(shares * np.log2(shares)).sum())
        classes.append(len(shares))
    return [f"{travel:.3f}", f"{separation:.3f}", f"{np.mean(entropies):.2f}", f"{np.mean(classes):.0f}"]


def write_set(folder: Path, shards: int) -> list[Path]:
    tars = []
    for shard in range(shards):
        tars.append(folder / f"sorted-train-{shard:06d}.tar")
        with open(tars[-1], "wb", buffering=0) as file:
            writer = ShardWriter(file)
            for number in range(shard * SAMPLES_PER_SHARD, (shard + 1) * SAMPLES_PER_SHARD):
                writer.add(f"{number:09d}", [("jpg", b"%09d" % number)])
            tars[-1].with_suffix(".idx").write_bytes(writer.finish()[1])
    return tars


def parse_number(data: bytes) -> int:
    return int(data)


if __name__ == "__main__":
    main()
