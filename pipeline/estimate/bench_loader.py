"""How many images a second the loader gives alone, where its time goes, whether a model would wait for it.

Each stage is measured by itself, fed from memory: reading, planning, decoding, decoding and augmenting, then
the whole loader, and a copy of a batch on its device (which is made on a GPU only: on the CPU the model is
given DALI's own memory). What a model wants is `plan`'s estimate: peak arithmetic x MFU. Processor time is
that of this process, all threads together.
"""

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.dali import Decoder, training_pipeline_def
from pipeline.data.loader import BatchBuilder, BatchSpec, Loader, prefetch_depth
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.reader import ShardReader
from pipeline.data.undecodable import UndecodableSamples
from pipeline.estimate.plan import plan
from pipeline.recipe import Recipe
from pipeline.recipe.sections import Source

STAGES = {"decode": "decode", "decode and augment": "augment"}
"""What is measured of DALI's work, and after which stage its graph ends."""
HELD = 8
"""Planned micro batches that feed the stages from memory."""
WARM = 3
"""Micro batches before the clock starts."""
NOISE = 196
"""Random numbers an image, of about as many as a method wants."""


@dataclass(frozen=True)
class Measured:
    """What a stage does alone."""

    stage: str
    threads: int
    images_per_s: float
    cpu_ms: float
    """Processor time an image, in milliseconds."""


@dataclass(frozen=True)
class Demand:
    """What a model would consume, a GPU, and what that asks of the loader."""

    gpu: str
    mfu: float
    images_per_s: float
    delivered: float
    """By the whole loader with the most threads that were measured."""
    data_wait: float
    """Share of the time that the model would wait, if nothing else delays it."""
    cores: float
    """That would have to decode for each GPU, at the processor time measured."""


@dataclass(frozen=True)
class Bench:
    method: str
    encoder: str
    samples: int
    mean_bytes: int
    device: str
    micro_batch: int
    prefetch: int
    measured: list[Measured]
    demand: Demand


def bench_loader(
    sources: Sequence[Source],
    recipe: Recipe,
    device: torch.device,
    threads: Sequence[int],
    seconds: float,
    gpu: str,
    mfu: float,
) -> Bench:
    """Measure the loader of `recipe` on shard sets; about `seconds` for each number of threads.

    UserError: what reading finds wrong, more samples that cannot be decoded than the recipe allows, an
    unknown GPU.
    """
    wanted = plan(recipe, gpus=1, gpu=gpu, mfu=mfu).images_per_s  # first, because it may say no
    data = recipe.data
    clock = _Clock(seconds / 4, recipe.engine.micro_batch, device)
    reader = ShardReader(sources, data)
    batch_builder = BatchBuilder(reader, recipe, NOISE, UndecodableSamples(reader, data.max_undecodable))
    with closing(_read_ahead(ShardReader(sources, data), recipe)) as read_ahead:
        held = [batch_builder.plan(*next(read_ahead)) for _ in range(HELD)]
        measured = [clock.measure("read", data.read_threads, lambda: next(read_ahead))]
    again = itertools.cycle(held)
    measured.append(clock.measure("plan", 1, lambda: _plan_again(batch_builder, next(again))))
    for number in sorted(threads):
        for name, last in STAGES.items():
            with closing(_decode(held, batch_builder, device, number, last)) as decoder:
                measured.append(clock.measure(name, number, decoder.next))
        with closing(Loader(ShardReader(sources, data), recipe, NOISE, device, threads=number)) as loader:
            images = loader.next().images
            measured.append(clock.measure("whole loader", number, loader.next))
    measured.append(clock.measure("copy", 1, images.clone))
    whole = measured[-2]
    return Bench(
        method=recipe.method.name,
        encoder=recipe.model.name,
        samples=reader.num_samples,
        mean_bytes=round(np.mean([image.size for spec in held for image in spec.encoded])),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        micro_batch=recipe.engine.micro_batch,
        prefetch=prefetch_depth(data, device),
        measured=measured,
        demand=Demand(
            gpu=gpu,
            mfu=mfu,
            images_per_s=wanted,
            delivered=whole.images_per_s,
            data_wait=max(0.0, 1 - whole.images_per_s / wanted),
            cores=wanted * whole.cpu_ms / 1000,
        ),
    )


def format_bench(bench: Bench) -> str:
    """The figures for a reader."""
    demand = bench.demand
    lines = [
        f"{bench.samples:,} samples, {bench.mean_bytes / 1000:.0f} kB on average, on {bench.device}; "
        f"micro batch {bench.micro_batch}, {bench.prefetch} ahead",
        f"{'stage':<22}{'threads':>8}{'images/s':>12}{'CPU ms an image':>18}",
    ]
    lines += [f"{m.stage:<22}{m.threads:>8}{m.images_per_s:>12,.0f}{m.cpu_ms:>18.2f}" for m in bench.measured]
    lines.append(
        f"{bench.method} on {bench.encoder}: one {demand.gpu} at {demand.mfu:.0%} of its peak takes "
        f"{demand.images_per_s:,.0f} images/s;"
    )
    lines.append(
        f"this loader gives {demand.delivered:,.0f}: data wait {demand.data_wait:.0%}; about "
        f"{demand.cores:.1f} cores like these for each GPU would keep up"
    )
    return "\n".join(lines)


def _read_ahead(reader: ShardReader, recipe: Recipe) -> ReadAhead:
    data, batch = recipe.data, recipe.engine.micro_batch // recipe.data.crops_per_image
    stream = reader.stream(recipe.seed)
    locations = (stream.locate(np.arange(at, at + batch)) for at in itertools.count(0, batch))
    return ReadAhead(reader, locations, data.read_threads, data.read_ahead_mb * 10**6)


def _plan_again(batch_builder: BatchBuilder, spec: BatchSpec) -> BatchSpec:
    return batch_builder.plan(spec.locations, spec.encoded)


def _decode(
    held: list[BatchSpec], batch_builder: BatchBuilder, device: torch.device, threads: int, last: str
) -> Decoder:
    data = batch_builder.recipe.data
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The external source node"
        )  # a graph cut short leaves inputs unused
        return Decoder(
            training_pipeline_def(data, device.type == "cuda", last),
            PrefetchThread(itertools.cycle(held), 1),
            batch_builder.replace,
            len(held[0].encoded),
            device,
            threads,
            prefetch_depth(data, device),
        )


class _Clock:
    """Measures stages for a number of seconds each."""

    def __init__(self, seconds: float, images: int, device: torch.device):
        """images: of one step of a stage."""
        self.seconds, self.images, self.device = seconds, images, device

    def measure(self, stage: str, threads: int, step: Callable[[], object]) -> Measured:
        for _ in range(WARM):
            step()
        self._wait()
        steps, began, cpu = 0, time.perf_counter(), time.process_time()
        while not steps or time.perf_counter() - began < self.seconds:
            step()
            steps += 1
        self._wait()
        images = steps * self.images
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        return Measured(stage, threads, images / took, 1000 * cpu / images)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
