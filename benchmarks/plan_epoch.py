"""Measure the cost of computing the sample order, and the time to the first batch of a resumed run.

    python benchmarks/plan_epoch.py              (IMAGENET_SAMPLE_DIR: photographs for the second part)

Each row is measured in a separate process that has imported only numpy.

    plan      an epoch of 100 M samples in 100,000 shards: the order of shards and windows
    locate    the samples of a global batch of 4,096 in the middle of the tenth epoch, including the plan
    mixture   the same for ten sources with weights
    resume    the first batch of 64 decoded images of a Loader that starts in the middle of the tenth epoch:
              seconds since the process started, including imports, and since the set was opened
"""

import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

SHARDS, SAMPLES_PER_SHARD, WINDOW, BATCH = 100_000, 1000, 16, 4096
MIDDLE = 9 * SHARDS * SAMPLES_PER_SHARD + SHARDS * SAMPLES_PER_SHARD // 2


def main() -> None:
    if sys.argv[1:2] == ["part"]:
        return print(PARTS[sys.argv[2]](*sys.argv[3:]))
    print("| what | result |\n| --- | --- |")
    for part in ("plan", "locate", "mixture"):
        print(f"| {part} | {run(part)} |", flush=True)
    photographs = os.environ.get("IMAGENET_SAMPLE_DIR")
    if photographs is None:
        sys.exit("IMAGENET_SAMPLE_DIR is not set; resume was not measured")
    with tempfile.TemporaryDirectory() as name:
        build = [sys.executable, "-m", "data_prep", "folder", photographs, f"{name}/set", "--shard-size", "100"]
        subprocess.run(build, check=True, capture_output=True)
        print(f"| resume | {run('resume', f'{name}/set', str(time.time()))} |")


def run(part: str, *arguments: str) -> str:
    command = [sys.executable, __file__, "part", part, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def plan() -> str:
    from pipeline.data.sampler import ShardedSampler

    sizes = np.full(SHARDS, SAMPLES_PER_SHARD)
    return measured(lambda: ShardedSampler(sizes, 0, WINDOW).epoch_order(9))


def locate() -> str:
    from pipeline.data.sampler import ShardedSampler

    sizes = np.full(SHARDS, SAMPLES_PER_SHARD)
    return measured(lambda: ShardedSampler(sizes, 0, WINDOW).locate(MIDDLE + np.arange(BATCH)))


def mixture() -> str:
    from pipeline.data.mixture import MixtureSampler

    sizes = np.split(np.full(SHARDS, SAMPLES_PER_SHARD), 10)
    weights = range(1, 11)
    return measured(lambda: MixtureSampler(sizes, weights, 0, WINDOW).locate(MIDDLE + np.arange(BATCH)))


def measured(function) -> str:
    before = peak_mb()
    start = time.perf_counter()
    function()
    return f"{1000 * (time.perf_counter() - start):.0f} ms, {peak_mb() - before:.0f} MB"


def resume(shards: str, start: str) -> str:
    import torch

    from pipeline.data.loader import Loader
    from pipeline.data.reader import ShardReader
    from pipeline.recipe import load_recipe

    imported = time.time()
    recipe = load_recipe("vitb16_mae", ["data.global_batch=64", "engine.micro_batch=64"])
    reader = ShardReader(shards, recipe.data)
    step = int(9.5 * reader.num_samples) // 64
    loader = Loader(reader, recipe, 196, torch.device("cpu"), step=step, threads=2)
    batch = loader.next()
    assert batch.images.shape == (64, 3, 224, 224)
    done = time.time()
    return f"{done - float(start):.1f} s, {done - imported:.2f} s"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


PARTS = {"plan": plan, "locate": locate, "mixture": mixture, "resume": resume}

if __name__ == "__main__":
    main()
