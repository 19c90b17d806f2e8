"""Preflight: check on every node, in under a minute, whether a run can start.

Invariant: nothing is written. Every rank checks by itself, and rank 0 reports the problems of all ranks with their
nodes, so that no allocation is wasted on a run that cannot train.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from pipeline.data.decode_options import prefetch_depth
from pipeline.data.gpu_decoder import nvjpeg_version, probe_roi_decoding
from pipeline.data.loader import BatchBuilder, Loader
from pipeline.data.reader import ShardReader
from pipeline.data.timing import time_steps
from pipeline.data.undecodable import UndecodableSamples
from pipeline.distributed.collectives import (
    all_gather_object,
    broadcast_object,
    destroy_process_group_on_exit,
    os_error_to_user_error,
    raise_on_all_ranks,
)
from pipeline.distributed.hardware import device_name, total_memory_gib
from pipeline.distributed.launch import DistInfo, init_dist_env, node_name, wait_for_rank_0
from pipeline.errors import AllRanksError, DeviceError, StoppedEarly, StorageTimeout, UserError
from pipeline.recipe.training import TrainingRecipe
from pipeline.train import engine
from pipeline.train.checkpoint import checkpoint_steps
from pipeline.train.engine_config import engine_config
from pipeline.train.micro_batch import MicroBatchLimits, resolve_micro_batch
from pipeline.train.run_directory import RunDirectory, package_versions
from pipeline.train.sharded_state import checkpoint_bytes
from pipeline.train.task import Task

MIN_DECODE_S, MIN_DECODED_BATCHES = 2.0, 8
"""Duration of the decoding measurement."""
NUM_PROBED = 64
"""Images whose regions are decoded in a child process if data.roi_decode is set."""
ALL_REDUCE_BYTES = 64 * 2**20
ROUNDS = 5
TIMEOUT_MINUTES = 10.0
"""Timeout of the rendezvous: as long as storage may take to fail."""


class Findings(NamedTuple):
    """The result of one rank's checks."""

    node: str
    device: str
    versions: dict[str, str]
    texts: dict[str, str]
    """Results by topic."""
    errors: list[UserError]


def preflight(
    make_task: Callable[[], Task], data: Sequence[str], run: RunDirectory, deepspeed_config: Path | None = None
) -> str:
    """Check everything that training with the same arguments needs. Collective.

    Args:
        make_task: Reads the recipe; its UserErrors are reported like others.
        data, run, deepspeed_config: As for `Trainer`.

    Returns:
        A report, one topic per line.

    Raises:
        AllRanksError: If the run cannot start, with the nodes.
        StoppedEarly: If only the storage does not respond, and the run has checkpoints.
    """
    started = time.monotonic()
    dist_info = init_dist_env()
    local = run_checks(make_task, data, run, deepspeed_config, dist_info)
    wait_for_rank_0(dist_info.rank, 60 * TIMEOUT_MINUTES)
    engine.init_distributed(TIMEOUT_MINUTES, with_watchdog=False)
    with destroy_process_group_on_exit():
        ranks = all_gather_object(local)
        has_checkpoints = broadcast_object(raise_on_all_ranks(lambda: bool(checkpoint_steps(run.checkpoints))))
        if any(rank.errors for rank in ranks):
            raise combine_errors(ranks, has_checkpoints)
        _raise_if_any([(rank.node, _version_differences(rank, ranks[0])) for rank in ranks])
        network = _time_all_reduce(dist_info)
        problem = "" if network else "all_reduce returned a wrong sum; test this node's network"
        _raise_if_any(all_gather_object((local.node, problem)))
    first = ranks[0]
    nodes, devices = (list(dict.fromkeys(values)) for values in zip(*((r.node, r.device) for r in ranks), strict=True))
    lines = {
        "ranks": f"{dist_info.world_size} on {', '.join(nodes)}; {', '.join(devices)}",
        **{topic: first.texts[topic] for topic in ("batch", "precision", "data", "run")},
        "decode": ", ".join(f"{r.node} {r.texts['decode']}" for r in ranks if "decode" in r.texts),
        "network": network,
        "versions": ", ".join(f"{name} {number}" for name, number in first.versions.items()),
        "took": f"{time.monotonic() - started:.0f} s",
    }
    return "\n".join(f"preflight: {topic:10}{text}" for topic, text in lines.items())


def run_checks(
    make_task: Callable[[], Task],
    data: Sequence[str],
    run: RunDirectory,
    deepspeed_config: Path | None,
    dist_info: DistInfo,
    min_decode_s: float = MIN_DECODE_S,
) -> Findings:
    """Run this rank's checks. If all pass, the first rank of each node also measures decoding. Not collective."""
    findings = Findings(node_name(), device_name(dist_info.device), package_versions(), {}, [])
    with _collect_errors(findings.errors):
        task = make_task()
        recipe = task.recipe = _resolve_micro_batch(task, data, run, dist_info)
        checks = {
            "batch": lambda: _check_batch(recipe, dist_info, deepspeed_config),
            "precision": lambda: engine.check_precision(recipe) or recipe.engine.precision,
            "data": lambda: _check_data(recipe, data),
            "run": lambda: _check_run(task, data, run),
        }
        for topic, check in checks.items():
            with _collect_errors(findings.errors):
                findings.texts[topic] = check()
        if dist_info.local_rank == 0 and not findings.errors:
            findings.texts["decode"] = _measure_decoding(recipe, data, dist_info, min_decode_s)
    return findings


def combine_errors(ranks: Sequence[Findings], has_checkpoints: bool) -> AllRanksError | StoppedEarly:
    """Combine the errors of all ranks: StoppedEarly, to retry, if a run with checkpoints only waits for storage."""
    errors = [(rank.node, error) for rank in ranks for error in rank.errors]
    retry = has_checkpoints and all(isinstance(error, StorageTimeout) for _, error in errors)
    text = _with_nodes([(node, str(error)) for node, error in errors])
    return StoppedEarly(text) if retry else AllRanksError(text)


@contextmanager
def _collect_errors(errors: list[UserError]) -> Iterator[None]:
    try:
        yield
    except (UserError, OSError) as error:
        user_error = os_error_to_user_error(error) if isinstance(error, OSError) else error
        if str(user_error) not in map(str, errors):
            errors.append(user_error)


def _raise_if_any(problems: list[tuple[str, str]]) -> None:
    if text := _with_nodes(problems):
        raise AllRanksError(text)


def _with_nodes(problems: list[tuple[str, str]]) -> str:
    """List every problem once, with the nodes that have it; empty if there is none."""
    nodes: dict[str, list[str]] = {}
    for node, problem in problems:
        if problem and node not in nodes.setdefault(problem, []):
            nodes[problem].append(node)
    return "; ".join(f"{', '.join(names)}: {problem}" for problem, names in nodes.items())


def _version_differences(rank: Findings, first: Findings) -> str:
    pairs = {name: (rank.versions.get(name), first.versions.get(name)) for name in rank.versions | first.versions}
    return "; ".join(
        f"{name} is {version}, but {expected} on {first.node}; install the same version"
        for name, (version, expected) in pairs.items()
        if version != expected
    )


def _check_batch(recipe: TrainingRecipe, dist_info: DistInfo, deepspeed_config: Path | None) -> str:
    steps = recipe.gradient_accumulation_steps(dist_info.world_size)
    engine_config(recipe, dist_info.world_size, deepspeed_config)
    return f"{recipe.data.global_batch} = {dist_info.world_size} ranks x {steps} x {recipe.engine.micro_batch}"


def _resolve_micro_batch(task: Task, data: Sequence[str], run: RunDirectory, dist_info: DistInfo) -> TrainingRecipe:
    """Choose engine.micro_batch if it is auto, for this rank's GPU."""
    recipe, world_size = task.recipe, dist_info.world_size

    def get_limits(memory_gib: float) -> MicroBatchLimits:
        reader = ShardReader(recipe.resolve_sources(data), recipe.data)
        return task.micro_batch_limits(reader, world_size, memory_gib)

    return resolve_micro_batch(recipe, run, world_size, total_memory_gib(dist_info.device), get_limits)


def _check_data(recipe: TrainingRecipe, data: Sequence[str]) -> str:
    reader = ShardReader(recipe.resolve_sources(data), recipe.data)
    shards = sum(len(shard_set.manifest.shards) for shard_set in reader.sets)
    return f"{reader.num_samples:,} images in {shards:,} shards of the expected sizes"


def _check_run(task: Task, data: Sequence[str], run: RunDirectory) -> str:
    """Check that the task fits the data, and that the disk has space for the checkpoints that will be kept."""
    recipe = task.recipe
    run.check(recipe)
    num_parameters = task.num_parameters(ShardReader(recipe.resolve_sources(data), recipe.data))
    parent = run.path
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"--run {run}: {parent} is not writable; give another directory")
    steps = checkpoint_steps(run.checkpoints)
    size, kept = checkpoint_bytes(recipe, num_parameters), recipe.train.keep_checkpoints
    needed = size * max(1, kept + 1 - len(steps))
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"--run {run}: {kept} checkpoints of {size / 1e9:.1f} GB and one being written need {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; free some space, or reduce train.keep_checkpoints"
        )
    state = f"resumes after step {steps[-1]}" if steps else "new"
    return f"{state}, {needed / 1e9:.1f} GB needed, {free / 1e9:,.0f} GB free"


def _measure_decoding(recipe: TrainingRecipe, data: Sequence[str], dist_info: DistInfo, min_seconds: float) -> str:
    """Measure the steady rate of the loader, after the batches that it prefetches while it starts."""
    reader, device = ShardReader(recipe.resolve_sources(data), recipe.data), dist_info.device
    on_gpu = device.type == "cuda"
    if on_gpu and recipe.data.roi_decode:
        _probe_roi_decoding(reader, recipe, device)
    threads = recipe.data.decode_threads or dist_info.num_cpus
    loader = Loader(reader, recipe, 1, device, dist_info.rank, dist_info.world_size, threads=threads)
    try:
        warmup = prefetch_depth(recipe.data, device) + 2
        timing = time_steps(loader.next, device, warmup=warmup, min_steps=MIN_DECODED_BATCHES, min_seconds=min_seconds)
    except DeviceError as error:  # reported with those of the other nodes
        raise UserError(str(error)) from error
    finally:
        loader.close()
    rate = timing.steps * recipe.engine.micro_batch / timing.seconds
    library = f", nvJPEG {nvjpeg_version()}" if on_gpu else ""
    return f"{rate:,.0f} images/s ({threads} threads, one rank{library})"


def _probe_roi_decoding(reader: ShardReader, recipe: TrainingRecipe, device: torch.device) -> None:
    locations = reader.sampler(recipe.seed).locate(np.arange(min(NUM_PROBED, reader.num_samples)))
    encoded = [reader.read(*place) for place in zip(locations.shard, locations.index_in_shard, strict=True)]
    builder = BatchBuilder(reader, recipe, 1, UndecodableSamples(reader, recipe.data.max_undecodable))
    probe_roi_decoding(builder.build(locations, encoded).inputs()[:3], device)


def _time_all_reduce(dist_info: DistInfo) -> str:
    """Return the bandwidth as text, empty if a sum is wrong."""
    if dist_info.world_size == 1:
        return "one rank, none needed"
    numbers = torch.empty(ALL_REDUCE_BYTES // 4, device=dist_info.device)
    seconds, correct = [], True
    for _ in range(ROUNDS):
        numbers.fill_(dist_info.rank + 1)
        started = time.perf_counter()
        dist.all_reduce(numbers)
        expected = dist_info.world_size * (dist_info.world_size + 1) / 2
        correct = correct and bool((numbers == expected).all())  # waits for the device
        seconds.append(time.perf_counter() - started)
    if not correct:
        return ""
    median = sorted(seconds)[ROUNDS // 2]
    sent = 2 * (dist_info.world_size - 1) / dist_info.world_size * ALL_REDUCE_BYTES
    return (
        f"all_reduce of {ALL_REDUCE_BYTES / 2**20:.0f} MiB in {1e3 * median:.1f} ms, "
        f"{sent / median / 1e9:.2f} GB/s per rank"
    )
