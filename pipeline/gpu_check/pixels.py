"""Checks 1 to 3: does DALI on a GPU return the pixels of the CPU path, for every kind of JPEG, in stream order?"""

import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from pipeline.data.dali import PipelineDef, eval_pipeline_def, training_pipeline_def
from pipeline.data.decode_options import DecodeOptions
from pipeline.data.decoder import ImageDecoder, PipelineInput
from pipeline.data.eval_loader import EvalBatchSpec, resize_and_crop_geometry
from pipeline.data.gpu_decoder import nvjpeg_version
from pipeline.data.loader import BatchBuilder, BatchSpec, Loader
from pipeline.data.pixels import jpeg_size
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.reader import ShardReader
from pipeline.data.undecodable import UndecodableSamples
from pipeline.distributed.launch import init_dist_env
from pipeline.gpu_check.check import Context, Finding, judge
from pipeline.recipe import Recipe
from pipeline.recipe.sections import DataSection, eval_resize_size

MEAN_BOUND, IMAGE_BOUND = 0.5, 2.0
"""Of 255 levels: mean absolute difference of all images, and of the worst one."""
PIXEL_BOUND = f"mean < {MEAN_BOUND} levels, worst image < {IMAGE_BOUND:g}"
HW_DECODER_LOADS = (0.0, 0.65, 1.0)
CPU_EQUIVALENT = "no GPU: its graph with CPU operators"
LAG = 3
"""Batches after which the stream check reads a batch, as many as DALI decodes ahead on a GPU."""

PixelSource = Callable[[Sequence[PipelineInput]], Iterator[torch.Tensor]]
"""Decodes batches; yields their images, (n, 3, H, W) float32, normalized."""


class Difference(NamedTuple):
    """Mean absolute difference of pixels, in levels of 255."""

    mean: float
    worst_image: float

    def __str__(self) -> str:
        return f"mean {self.mean:.3f}, worst image {self.worst_image:.2f} levels"

    @property
    def is_small(self) -> bool:
        return self.mean < MEAN_BOUND and self.worst_image < IMAGE_BOUND


def check_roi_decode(context: Context) -> Finding:
    """Check 1: decode only the crop's region, as with data.roi_decode=true, of every kind of JPEG."""
    recipe, device = small_batches(context), init_dist_env().device
    batches = training_batches(recipe, context.photographs)
    graph = training_pipeline_def(recipe.data, gpu_options(context, roi=True), all_in_dali=True)
    source = pixel_source(graph, device)
    finding = judge_pixels(source, cpu_source(recipe.data), batches, recipe.data)
    if not context.on_gpu:
        return replace(finding, value=f"{CPU_EQUIVALENT}: {finding.value}")
    usage = _jpeg_engine_usage(device, source(1000 * batches))
    return replace(finding, value=f"{finding.value}; nvJPEG {nvjpeg_version()}; JPEG engine {usage}")


def check_pixels(context: Context) -> Finding:
    """Check 2: pixels of training and evaluation, with several shares of the hardware decoder, and twice alike."""
    recipe, device = small_batches(context), init_dist_env().device
    data = recipe.data
    texts, passed = [], True
    for load in HW_DECODER_LOADS if context.on_gpu else HW_DECODER_LOADS[:1]:
        options = gpu_options(context, hw_decoder_load=load)
        training = judge_pixels(
            pixel_source(training_pipeline_def(data, options, all_in_dali=True), device),
            cpu_source(data),
            training_batches(recipe, context.data),
            data,
            repeat=True,
        )
        evaluation = judge_pixels(
            pixel_source(eval_pipeline_def(data, options, all_in_dali=True), device),
            cpu_source(data, is_training=False),
            eval_batches(recipe, context.data),
            data,
            repeat=True,
        )
        share = f", hw_decoder_load {load:g}" if context.on_gpu else ""
        texts.append(f"training{share}: {training.value}; evaluation{share}: {evaluation.value}")
        passed = passed and training.verdict == evaluation.verdict == "passed"
    prefix = "" if context.on_gpu else f"{CPU_EQUIVALENT}: "
    return Finding(prefix + "; ".join(texts), f"{PIXEL_BOUND}; twice the same bits", judge(passed))


def check_stream_order(context: Context) -> Finding:
    """Check 3: batches that are read late, on a busy stream, are those of a synchronized loader."""
    recipe, device = small_batches(context), init_dist_env().device
    busy = _KeepBusy(device)
    num_batches = 200 if context.on_gpu else 24

    def digests(lag: int, before_each: Callable[[], None]) -> list[int]:
        loader = Loader(ShardReader(context.data, recipe.data), recipe, 1, device, threads=2, deterministic=True)
        try:
            return late_digests((loader.next().images for _ in range(num_batches)), lag, before_each)
        finally:
            loader.close()

    equal = digests(LAG, busy) == digests(0, busy.wait)
    what = "on a busy stream" if context.on_gpu else "on the CPU, where there is no stream"
    return Finding(
        f"{num_batches} batches read {LAG} batches late {what}: {'equal' if equal else 'different'}",
        "the bits of synchronized batches",
        judge(equal),
    )


def judge_pixels(
    source: PixelSource,
    reference: PixelSource,
    batches: Sequence[PipelineInput],
    data: DataSection,
    repeat: bool = False,
) -> Finding:
    """Compare a source's pixels with a reference's.

    Args:
        repeat: Also decode everything twice, and require the same bits.
    """
    images = torch.cat([batch.cpu() for batch in source(batches)])
    expected = torch.cat([batch.cpu() for batch in reference(batches)])
    levels = 255 * torch.tensor(data.std)[:, None, None]
    per_image = ((images - expected) * levels).abs().mean(dim=(1, 2, 3))
    difference = Difference(per_image.mean().item(), per_image.max().item())
    text, passed = f"{len(images)} images, {difference}", difference.is_small
    if repeat:
        again = torch.cat([batch.cpu() for batch in source(batches)])
        same = torch.equal(again, images)
        text += "" if same else ", other bits the second time"
        passed = passed and same
    return Finding(text, PIXEL_BOUND, judge(passed))


def late_digests(batches: Iterator[torch.Tensor], lag: int, before_each: Callable[[], None]) -> list[int]:
    """Return a digest of each batch's bits, computed when `lag` later batches have been taken from the iterator."""
    held: list[torch.Tensor] = []
    digests: list[torch.Tensor] = []
    for images in itertools.chain(batches, itertools.repeat(None, lag)):
        before_each()
        if images is not None:
            held.append(images)
        if held and (len(held) > lag or images is None):
            digests.append(digest(held.pop(0)))
    return torch.stack(digests).tolist()


def digest(images: torch.Tensor) -> torch.Tensor:
    """Return a 0-d int64 that depends on every bit of float32 images and on their order, without synchronization."""
    bits = images.contiguous().view(torch.int32).flatten().long()
    return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()


def training_batches(recipe: Recipe, shards: str) -> list[BatchSpec]:
    """Return the first 64 samples of a shard set in training's order, or a micro batch if it is larger."""
    reader = ShardReader(shards, recipe.data)
    builder = BatchBuilder(reader, recipe, 1, UndecodableSamples(reader, 0))
    sampler, batch = reader.sampler(recipe.seed), recipe.engine.micro_batch
    specs = []
    for start in range(0, 64, batch):
        locations = sampler.locate(np.arange(start, start + batch))
        places = zip(locations.shard.tolist(), locations.index_in_shard.tolist(), strict=True)
        specs.append(builder.build(locations, [reader.read(*place) for place in places]))
    return specs


def eval_batches(recipe: Recipe, shards: str) -> list[EvalBatchSpec]:
    """Return the same samples with the geometry of evaluation."""
    specs = []
    for spec in training_batches(recipe, shards):
        sizes = np.array([jpeg_size(image) for image in spec.encoded])
        size = recipe.data.image_size
        geometry = resize_and_crop_geometry(sizes, eval_resize_size(size), size)
        specs.append(EvalBatchSpec(spec.locations, None, spec.encoded, *geometry))
    return specs


def gpu_options(context: Context, roi: bool = False, hw_decoder_load: float = 0.65) -> DecodeOptions:
    """Return how to decode on the GPU; without one, on the CPU."""
    return DecodeOptions("mixed" if context.on_gpu else "cpu", roi, hw_decoder_load)


def cpu_source(data: DataSection, is_training: bool = True) -> PixelSource:
    """Return the CPU path, whose pixels the tests compare with Pillow's."""
    pipeline_def = training_pipeline_def if is_training else eval_pipeline_def
    return pixel_source(pipeline_def(data, DecodeOptions()), torch.device("cpu"))


def pixel_source(graph: PipelineDef, device: torch.device) -> PixelSource:
    """Return a source that decodes with this graph."""

    def decode(batches: Sequence[PipelineInput]) -> Iterator[torch.Tensor]:
        thread = PrefetchThread(iter(batches), 1)
        batch_size = max(len(batch.inputs()[0]) for batch in batches)
        decoder = ImageDecoder(graph, thread, _refuse, batch_size, device, threads=2, prefetch=2)
        try:
            for _ in batches:
                yield decoder.next()[1]
        finally:
            decoder.close()
            thread.close()

    return decode


def small_batches(context: Context) -> Recipe:
    """Return MAE's recipe with small micro batches."""
    batch = 64 if context.on_gpu else 16
    return context.recipe("vitb16_mae", f"engine.micro_batch={batch}", f"data.global_batch={batch}")


def _refuse(batch: PipelineInput, row: int, reason: str) -> NoReturn:
    raise RuntimeError(f"image {row} of a batch cannot be decoded: {reason}")


class _KeepBusy:
    """Puts matrix products on the current stream, so that the GPU lags behind the host."""

    def __init__(self, device: torch.device):
        self._device = device
        self._matrix = torch.randn(4096 if device.type == "cuda" else 64, 4096, device=device)

    def __call__(self) -> None:
        for _ in range(4):
            torch.mm(self._matrix, self._matrix.T)

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _jpeg_engine_usage(device: torch.device, decoding: Iterator[torch.Tensor], seconds: float = 3.0) -> str:
    """Return how busy nvidia-smi reports the hardware JPEG decoder while batches are decoded."""
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=utilization.jpeg", "--format=csv,noheader,nounits"]
    readings: list[str] = []
    stopped = threading.Event()

    def read() -> None:
        while not stopped.wait(0.3):
            try:
                readings.append(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip())
            except (OSError, subprocess.TimeoutExpired):
                return

    thread = threading.Thread(target=read)
    thread.start()
    started = time.monotonic()
    while time.monotonic() - started < seconds and next(decoding, None) is not None:
        torch.cuda.synchronize(device)
    stopped.set()
    thread.join()
    numbers = [int(reading) for reading in readings if reading.isdecimal()]
    return f"up to {max(numbers)} % busy" if numbers else "not reported by nvidia-smi"
