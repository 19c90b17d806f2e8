"""Check 4: a damaged JPEG costs one image; a device that fails on every image costs none."""

import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.data.dali import PipelineDef, training_pipeline_def
from pipeline.data.decoder import ImageDecoder
from pipeline.data.loader import BatchBuilder, BatchSpec
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.data.reader import ShardReader
from pipeline.data.undecodable import UndecodableSamples
from pipeline.distributed.launch import init_dist_env
from pipeline.errors import DeviceError, UserError
from pipeline.gpu_check.check import Context, Finding, judge
from pipeline.gpu_check.pixels import gpu_options, small_batches, training_batches
from pipeline.recipe import Recipe

DAMAGED_ROW = 1
FREE_BYTES = 200 * 2**20
"""What is left of a full GPU."""
FULL_BATCH = 512
"""Images whose pixels (308 MB at 224 px) do not fit there."""
BOUND = "one image replaced, the others unchanged; a device's failure replaces none and says so"

Decode = Callable[[Iterable[BatchSpec], BatchBuilder], list[torch.Tensor]]
"""Decodes batches, with the builder's substitutes for images that cannot be decoded."""


def check_decode_errors(context: Context) -> Finding:
    """Decode a damaged JPEG, then on a full GPU; without a GPU, with a decoder that fails on every image."""
    recipe, device = small_batches(context), init_dist_env().device
    batches = training_batches(recipe, context.photographs)[:1]
    graph = training_pipeline_def(recipe.data, gpu_options(context), all_in_dali=True)
    size = FULL_BATCH if context.on_gpu else len(batches[0].encoded)
    decode = decode_with(graph, device, size)
    damaged = judge_damaged(decode, recipe, context.photographs, batches[0], context.scratch / "damaged")
    if context.on_gpu:
        large = recipe.engine.model_copy(update={"micro_batch": FULL_BATCH})
        full = training_batches(recipe.model_copy(update={"engine": large}), context.photographs)
        failing = judge_failure(
            decode, recipe, context.photographs, _fill_memory(batches, full, device), context.scratch / "full"
        )
        what = "full GPU"
        gc.collect()
        torch.cuda.empty_cache()
        decode(batches, _builder(recipe, context.photographs, context.scratch / "afterwards"))  # it still works
    else:
        broken = decode_with(fail_on_every_image(graph), device, size)
        failing = judge_failure(broken, recipe, context.photographs, batches, context.scratch / "broken")
        what = "no GPU to fill: a decoder that fails on every image"
    passed = damaged.verdict == failing.verdict == "passed"
    return Finding(f"{damaged.value}; {what}: {failing.value}", BOUND, judge(passed))


def judge_damaged(decode: Decode, recipe: Recipe, shards: str, batch: BatchSpec, folder: Path) -> Finding:
    """Damage one image of a batch; it alone must be replaced, and be recorded in `folder`."""
    builder = _builder(recipe, shards, folder)
    (good,) = decode([batch], builder)
    encoded = list(batch.encoded)
    encoded[DAMAGED_ROW] = damage(encoded[DAMAGED_ROW])
    (images,) = decode([batch._replace(encoded=encoded)], builder)
    difference = 255 * min(recipe.data.std) * (images - good).abs().mean(dim=(1, 2, 3)).cpu()
    replaced = [row for row, levels in enumerate(difference.tolist()) if levels > 2]
    recorded = _num_recorded(folder)
    return Finding(
        f"damaged JPEG: {len(replaced)} image replaced, {recorded} recorded",
        BOUND,
        judge(replaced == [DAMAGED_ROW] and recorded == 1),
    )


def judge_failure(decode: Decode, recipe: Recipe, shards: str, batches: Iterable[BatchSpec], folder: Path) -> Finding:
    """Decode on a device that fails; it must be named, and no image be replaced."""
    builder = _builder(recipe, shards, folder)
    try:
        decode(batches, builder)
        text, named = "no error", False
    except (DeviceError, UserError, torch.OutOfMemoryError) as error:
        text, named = str(error), builder.undecodable.count == 0
    except RuntimeError as error:
        text, named = f"{type(error).__name__}: {error}", False
    recorded = _num_recorded(folder)
    return Finding(f'"{" ".join(text.split())[:120]}", {recorded} recorded', BOUND, judge(named and not recorded))


def decode_with(graph: PipelineDef, device: torch.device, batch_size: int) -> Decode:
    """Return a function that decodes with this graph, as the loader does."""

    def decode(batches: Iterable[BatchSpec], builder: BatchBuilder) -> list[torch.Tensor]:
        thread = PrefetchThread(iter(batches), 1)
        confirm = builder.undecodable.confirm
        decoder = ImageDecoder(
            graph, thread, builder.replace, batch_size, device, threads=2, prefetch=2, confirm=confirm
        )
        images = []
        try:
            while True:
                images.append(decoder.next()[1])
        except StopIteration:
            return images
        finally:
            decoder.close()
            thread.close()

    return decode


def fail_on_every_image(graph: PipelineDef) -> PipelineDef:
    """Return a graph that decodes zeros instead of its input."""
    return graph._replace(build_graph=lambda encoded, *others: graph.build_graph(encoded ^ encoded, *others))


def damage(encoded: np.ndarray) -> np.ndarray:
    """Return a JPEG with a valid header and zeros from the start of the scan on."""
    damaged = encoded.copy()
    damaged[encoded.tobytes().index(b"\xff\xda") :] = 0
    return damaged


def _fill_memory(batches: list[BatchSpec], full_batches: list[BatchSpec], device: torch.device) -> Iterator[BatchSpec]:
    """Yield batches, then fill the GPU's memory and yield larger ones. The memory is freed when the iterator is."""
    yield from batches
    held = []
    while (free := torch.cuda.mem_get_info(device)[0]) > FREE_BYTES:
        try:
            held.append(torch.empty(min(free - FREE_BYTES, 2**30), dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:  # DALI has just taken some
            break
    yield from 4 * full_batches
    held.clear()


def _builder(recipe: Recipe, shards: str, folder: Path) -> BatchBuilder:
    reader = ShardReader(shards, recipe.data)
    return BatchBuilder(reader, recipe, 1, UndecodableSamples(reader, recipe.data.max_undecodable, folder))


def _num_recorded(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("rank-*.jsonl"))
