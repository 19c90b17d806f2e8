"""What can be known before a run begins, found out in under a minute on every node at once.

Invariant: nothing is written. Every rank looks for itself and tells rank 0, which says what any of them
found, with the node's name; so no cluster is kept busy by a run that cannot go on.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import (
    all_gather_object,
    broadcast_object,
    destroy_process_group_on_exit,
    raise_on_all_ranks,
    storage_error,
)
from pipeline.distributed.hardware import device_name
from pipeline.distributed.launch import DistInfo, init_dist_env, node_name
from pipeline.errors import AllRanksError, StoppedEarly, StorageTimeout, UserError
from pipeline.recipe.base import TrainingRecipe
from pipeline.train import checkpoint, engine, run_directory
from pipeline.train.engine_config import engine_config
from pipeline.train.sharded_state import checkpoint_bytes
from pipeline.train.task import Task

DECODED = 64
"""Images that a node decodes, at least."""
REDUCED = 64 * 2**20
"""Bytes of the all-reduce."""
ROUNDS = 5
TIMEOUT_MINUTES = 10.0
"""For the ranks to meet: as long as one may wait for storage that does not answer, and no longer."""


class Findings(NamedTuple):
    """What one rank found: texts by subject, and what is in the way."""

    node: str
    device: str
    versions: dict[str, str]
    texts: dict[str, str]
    faults: list[UserError]


def preflight(
    make_task: Callable[[], Task], data: Sequence[str], run: Path, deepspeed_config: Path | None = None
) -> str:
    """Look at everything that `train` with the same arguments needs. Every rank calls it.

    make_task: reads the recipe, too; what it finds wrong is a finding like others. Returns the findings, a
    line each, for a reader. UserError where something is in the way, with the nodes; StoppedEarly where that
    is only storage that does not answer a run with checkpoints.
    """
    began = time.monotonic()
    dist_info = init_dist_env()
    mine = look(make_task, data, run, deepspeed_config, dist_info)
    engine.init_distributed(TIMEOUT_MINUTES, watched=False)
    with destroy_process_group_on_exit():
        everyone = all_gather_object(mine)
        begun = broadcast_object(
            raise_on_all_ranks(lambda: bool(checkpoint.checkpoint_steps(run / "checkpoints")))
        )
        if any(rank.faults for rank in everyone):
            raise complaint(everyone, begun)
        _complain([(rank.node, _difference(rank, everyone[0])) for rank in everyone])
        reduced = _all_reduce(dist_info)
        fault = "" if reduced else "the all-reduce gave a wrong sum; test this node's network"
        _complain(all_gather_object((mine.node, fault)))
    first = everyone[0]
    nodes = list(dict.fromkeys(rank.node for rank in everyone))
    lines = {
        "ranks": f"{dist_info.world_size} on {', '.join(nodes)}; {', '.join({r.device: 0 for r in everyone})}",
        **{name: first.texts[name] for name in ("batch", "precision", "data", "run")},
        "decode": ", ".join(f"{r.node} {r.texts['decode']}" for r in everyone if "decode" in r.texts),
        "network": reduced,
        "versions": ", ".join(f"{name} {number}" for name, number in first.versions.items()),
        "took": f"{time.monotonic() - began:.0f} s",
    }
    return "\n".join(f"preflight: {name:10}{text}" for name, text in lines.items())


def look(
    make_task: Callable[[], Task],
    data: Sequence[str],
    run: Path,
    deepspeed_config: Path | None,
    dist_info: DistInfo,
) -> Findings:
    """What this rank finds by itself. A node's first rank decodes where nothing is in the way."""
    found = Findings(node_name(), device_name(dist_info.device), run_directory.versions(), {}, [])
    with _noting(found.faults):
        task = make_task()
        recipe = task.recipe
        checks = {
            "batch": lambda: _batch(recipe, dist_info, deepspeed_config),
            "precision": lambda: engine.check_precision(recipe) or recipe.engine.precision,
            "data": lambda: _data(recipe, data),
            "run": lambda: _run(task, data, run),
        }
        for name, check in checks.items():
            with _noting(found.faults):
                found.texts[name] = check()
        if dist_info.local_rank == 0 and not found.faults:
            found.texts["decode"] = _decode(recipe, data, dist_info)
    return found


@contextmanager
def _noting(faults: list[UserError]) -> Iterator[None]:
    try:
        yield
    except (UserError, OSError) as error:
        fault = storage_error(error) if isinstance(error, OSError) else error
        if str(fault) not in map(str, faults):
            faults.append(fault)


def complaint(everyone: Sequence[Findings], begun: bool) -> AllRanksError | StoppedEarly:
    """Of what the ranks found to be in the way. begun: whether the run has checkpoints."""
    faults = [(rank.node, fault) for rank in everyone for fault in rank.faults]
    waits = begun and all(isinstance(fault, StorageTimeout) for _, fault in faults)
    text = _with_nodes([(node, str(fault)) for node, fault in faults])
    return StoppedEarly(text) if waits else AllRanksError(text)


def _complain(found: list[tuple[str, str]]) -> None:
    if text := _with_nodes(found):
        raise AllRanksError(text)


def _with_nodes(found: list[tuple[str, str]]) -> str:
    """Every fault once, and the nodes that have it; empty where there is none."""
    nodes: dict[str, list[str]] = {}
    for node, fault in found:
        if fault and node not in nodes.setdefault(fault, []):
            nodes[fault].append(node)
    return "; ".join(f"{', '.join(where)}: {fault}" for fault, where in nodes.items())


def _difference(rank: Findings, first: Findings) -> str:
    """How a rank's software differs from rank 0's."""
    pairs = {
        name: (rank.versions.get(name), first.versions.get(name)) for name in rank.versions | first.versions
    }
    return "; ".join(
        f"{name} is {here}, on {first.node} it is {there}: install the same"
        for name, (here, there) in pairs.items()
        if here != there
    )


def _batch(recipe: TrainingRecipe, dist_info: DistInfo, deepspeed_config: Path | None) -> str:
    accumulation = recipe.accumulation(dist_info.world_size)
    engine_config(recipe, dist_info.world_size, deepspeed_config)
    return f"{recipe.data.global_batch} = {dist_info.world_size} ranks x {accumulation} x {recipe.engine.micro_batch}"


def _data(recipe: TrainingRecipe, data: Sequence[str]) -> str:
    reader = ShardReader(recipe.sources(data), recipe.data)
    shards = sum(len(place.manifest.shards) for place in reader.sets)
    return f"{reader.num_samples:,} images in {shards:,} shards, each of the size it should have"


def _run(task: Task, data: Sequence[str], run: Path) -> str:
    """Whether the task can train on the data, and the directory be written; and whether the disk holds as
    many checkpoints as will be kept, and one more."""
    recipe = task.recipe
    run_directory.check(run, recipe)
    parameters = task.parameters(ShardReader(recipe.sources(data), recipe.data))
    place = run
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"--run {run}: {place} cannot be written; give another directory")
    steps = checkpoint.checkpoint_steps(run / "checkpoints")
    each = checkpoint_bytes(recipe, parameters)
    needed = each * max(1, recipe.train.keep_checkpoints + 1 - len(steps))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"--run {run}: {needed / 1e9:.1f} GB are needed for train.keep_checkpoints "
            f"{recipe.train.keep_checkpoints} of {each / 1e9:.1f} GB and one being written, "
            f"{free / 1e9:.1f} GB are free; make room, or keep fewer"
        )
    at = f"continues after step {steps[-1]}" if steps else "new"
    return f"{at}, {needed / 1e9:.1f} GB needed, {free / 1e9:,.0f} GB free"


def _decode(recipe: TrainingRecipe, data: Sequence[str], dist_info: DistInfo) -> str:
    reader = ShardReader(recipe.sources(data), recipe.data)
    threads = recipe.data.decode_threads or dist_info.num_cpus
    loader = Loader(
        reader, recipe, 1, dist_info.device, dist_info.rank, dist_info.world_size, threads=threads
    )
    try:
        loader.next()  # starts the decoder
        batches = -(-DECODED // recipe.engine.micro_batch)
        began = time.perf_counter()
        for _ in range(batches):
            loader.next()
        if dist_info.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
    finally:
        loader.close()
    return f"{batches * recipe.engine.micro_batch / took:,.0f} images/s ({threads} threads, one rank)"


def _all_reduce(dist_info: DistInfo) -> str:
    """The bandwidth, or an empty string where the sum is wrong."""
    if dist_info.world_size == 1:
        return "one rank, none needed"
    numbers = torch.empty(REDUCED // 4, device=dist_info.device)
    seconds = []
    for _ in range(ROUNDS):
        numbers.fill_(dist_info.rank + 1)
        began = time.perf_counter()
        dist.all_reduce(numbers)
        right = bool(
            (numbers == dist_info.world_size * (dist_info.world_size + 1) / 2).all()
        )  # waits for the device
        seconds.append(time.perf_counter() - began)
    took = sorted(seconds)[ROUNDS // 2]
    sent = 2 * (dist_info.world_size - 1) / dist_info.world_size * REDUCED
    text = (
        f"all-reduce of {REDUCED / 2**20:.0f} MiB in {1e3 * took:.1f} ms, {sent / took / 1e9:.2f} GB/s a rank"
    )
    return text if right else ""
