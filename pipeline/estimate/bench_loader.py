"""Benchmark of the loader without a model.

Each stage is measured alone, on batches held in memory: reading, planning, decoding, decoding and augmenting;
then the whole loader, and a copy of a batch on its device. On a GPU, decoding is measured with all, none and the
recipe's share of the JPEGs on the hardware decoder, and by regions if data.roi_decode is set. A model's consumption is
`plan`'s estimate: peak FLOP/s x MFU. CPU time is this process's, all threads together.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from pipeline.data.dali import training_pipeline_def
from pipeline.data.decode_options import DecodeOptions, decode_options, prefetch_depth
from pipeline.data.decoder import ImageDecoder
from pipeline.data.gpu_decoder import nvjpeg_version
from pipeline.data.loader import BatchBuilder, BatchSpec, Loader
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.reader import ShardReader
from pipeline.data.timing import time_steps
from pipeline.data.undecodable import UndecodableSamples
from pipeline.estimate.plan import plan
from pipeline.recipe import Recipe
from pipeline.recipe.sections import DataSection, Source

LastStage = Literal["decode", "augment"]
NUM_HELD = 8  # micro batches held in memory
NOISE_SIZE = 196  # random numbers per image, about as many as a method needs


@dataclass(frozen=True)
class StageResult:
    """Throughput of one stage alone."""

    stage: str
    threads: int
    images_per_s: float
    cpu_ms: float
    """CPU milliseconds per image."""


def bench_loader(
    sources: Sequence[Source],
    recipe: Recipe,
    device: torch.device,
    threads: Sequence[int],
    seconds: float,
    gpu: str,
    mfu: float,
) -> dict[str, Any]:
    """Measure a recipe's loader, and compare it with the consumption of a model on one GPU.

    Args:
        sources: Shard sets to read.
        recipe: Determines transforms, batch size and model.
        device: Where to decode.
        threads: Numbers of decoding threads to measure.
        seconds: Approximate time per number of threads.
        gpu: A name in `GPUS`, for the model's consumption.
        mfu: Model FLOP utilization, in (0, 1].

    Returns:
        The results, as `bench-loader --json` prints them. `demand` has the model's images/s, the loader's at the
        highest number of threads, the share of time the model waits, and the CPU cores needed per GPU.

    Raises:
        UserError: If reading fails, too many samples are undecodable, or the GPU is unknown.
    """
    needed = plan(recipe, gpus=1, gpu=gpu, mfu=mfu).images_per_s  # first: it validates gpu and mfu
    data = recipe.data
    options, variants = decode_options(data, device), decode_variants(data, device)
    warmup = prefetch_depth(data, device) + 2
    timer = _StageTimer(seconds / (3 + len(variants)), recipe.engine.micro_batch, device, warmup)
    reader = ShardReader(sources, data)
    builder = BatchBuilder(reader, recipe, NOISE_SIZE, UndecodableSamples(reader, data.max_undecodable))
    with closing(_read_ahead(ShardReader(sources, data), recipe)) as read_ahead:
        specs = [builder.build(*next(read_ahead)) for _ in range(NUM_HELD)]
        results = [timer.measure("read", data.read_threads, lambda: next(read_ahead))]
    inputs = itertools.cycle([(spec.locations, spec.encoded) for spec in specs])
    results.append(timer.measure("plan", 1, lambda: builder.build(*next(inputs))))
    images = None
    for number in sorted(threads):
        stages: list[tuple[str, DecodeOptions, LastStage]] = [
            *((stage, variant, "decode") for stage, variant in variants.items()),
            ("decode and augment", options, "augment"),
        ]
        for stage, variant, last in stages:
            with closing(_decoder(specs, builder, device, number, variant, last)) as decoder:
                results.append(timer.measure(stage, number, decoder.next))
        with closing(Loader(ShardReader(sources, data), recipe, NOISE_SIZE, device, threads=number)) as loader:
            images = loader.next().images
            results.append(timer.measure("whole loader", number, loader.next))
    assert images is not None
    whole = results[-1]
    results.append(timer.measure("copy", 1, images.clone))
    return {
        "method": recipe.method.name,
        "encoder": recipe.model.name,
        "samples": reader.num_samples,
        "mean_bytes": round(np.mean([image.size for spec in specs for image in spec.encoded])),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        "nvjpeg": nvjpeg_version() if device.type == "cuda" else None,
        "micro_batch": recipe.engine.micro_batch,
        "prefetch": prefetch_depth(data, device),
        "measured": [asdict(result) for result in results],
        "demand": {
            "gpu": gpu,
            "mfu": mfu,
            "images_per_s": needed,
            "delivered": whole.images_per_s,
            "data_wait": max(0.0, 1 - whole.images_per_s / needed),
            "cores": needed * whole.cpu_ms / 1000,
        },
    }


def decode_variants(data: DataSection, device: torch.device) -> dict[str, DecodeOptions]:
    """Return the ways of decoding to compare on a device, by the name of their stage."""
    options = decode_options(data, device)
    if options.backend == "cpu":
        return {"decode": options}
    shares = sorted({0.0, options.hw_decoder_load, 1.0})
    variants = {f"decode, hardware {share:.2f}": options._replace(roi=False, hw_decoder_load=share) for share in shares}
    return variants | ({"decode, regions": options} if options.roi else {})


def format_bench(result: dict[str, Any]) -> str:
    """Format the results as a table."""
    lines = [
        "{samples:,} samples, {mean_bytes:,} bytes on average, on {device}; micro batch {micro_batch}, "
        "prefetch {prefetch}".format(**result),
        f"{'stage':<24}{'threads':>8}{'images/s':>12}{'CPU ms/image':>18}",
    ]
    row = "{stage:<24}{threads:>8}{images_per_s:>12,.0f}{cpu_ms:>18.2f}"
    lines += [row.format(**stage) for stage in result["measured"]]
    lines.append(
        "{method} on {encoder}: one {gpu} at {mfu:.0%} MFU consumes {images_per_s:,.0f} images/s;\n"
        "this loader delivers {delivered:,.0f}: data wait {data_wait:.0%}; about {cores:.1f} of these cores "
        "per GPU would be enough".format(**result, **result["demand"])
    )
    return "\n".join(lines)


def _read_ahead(reader: ShardReader, recipe: Recipe) -> ReadAhead:
    data, batch = recipe.data, recipe.engine.micro_batch // recipe.data.crops_per_image
    sampler = reader.sampler(recipe.seed)
    locations = (sampler.locate(np.arange(start, start + batch)) for start in itertools.count(0, batch))
    return ReadAhead(reader, locations, data.read_threads, data.read_ahead_mb * 10**6)


def _decoder(
    specs: list[BatchSpec],
    builder: BatchBuilder,
    device: torch.device,
    threads: int,
    options: DecodeOptions,
    last: LastStage,
) -> ImageDecoder:
    data = builder.recipe.data
    with warnings.catch_warnings():
        # A pipeline that ends early does not use all of its inputs.
        warnings.filterwarnings("ignore", "The external source node")
        return ImageDecoder(
            training_pipeline_def(data, options, last),
            PrefetchThread(itertools.cycle(specs), 1),
            builder.replace,
            len(specs[0].encoded),
            device,
            threads,
            prefetch_depth(data, device),
        )


class _StageTimer:
    """Measures stages that process `images` per step, each for a number of seconds."""

    def __init__(self, seconds: float, images: int, device: torch.device, warmup: int):
        self.seconds, self.images, self.device, self.warmup = seconds, images, device, warmup

    def measure(self, stage: str, threads: int, step: Callable[[], object]) -> StageResult:
        timing = time_steps(step, self.device, warmup=self.warmup, min_seconds=self.seconds)
        images = timing.steps * self.images
        return StageResult(stage, threads, images / timing.seconds, 1000 * timing.cpu_seconds / images)
