"""Features of a shard set: extracted once, by all ranks, and kept.

Invariant: every sample has one feature, in the order of the shard set, and batches are the same whatever the
number of ranks; so features are, too. A file of the cache is whole, by its checksum, and
its name is a digest of all that decides what is in it: weights, images, how they are cut, in which precision
they are computed, and the version of the code that does it.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from pipeline.data.eval_loader import EvalLoader
from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import all_gather_object, all_gather_uneven, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.feature_extractor import FrozenEncoder
from pipeline.io.atomic import atomic_path
from pipeline.io.tensors import save_tensors
from pipeline.recipe.sections import DataSection, resize_of

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
VERSION = 1
"""Of the code: whoever changes what comes out of the same weights and images raises it."""
BATCH = 128
CHECKSUM = "sha256"
"""In the metadata of a file of features."""
INTERVAL = 10.0
"""Seconds between two lines of progress."""


class Features(NamedTuple):
    values: torch.Tensor
    """(N, D) float32, on the CPU, in the order of the shard set."""
    labels: torch.Tensor
    """(N,) int64."""


class FeatureExtractor:
    """Takes shard sets through one representation. Every rank has one, and every rank calls it."""

    def __init__(
        self,
        model: FrozenEncoder,
        dist_info: DistInfo,
        *,
        resize: int | None = None,
        precision: Precision = "fp32",
        batch: int = BATCH,
        cache: Path | None = None,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        """UserError where `resize` is too small.

        resize: the shorter side before the centre is cut out; None: as MAE, `resize_of`. cache: a directory
        for features; None: they are not kept. Where it cannot be written they are not either, which is said.
        alive: called now and then."""
        self.model, self.dist_info = model.to(dist_info.device), dist_info
        size = model.image_size
        self.resize = resize or resize_of(size)
        if self.resize < size:
            raise UserError(f"--resize {resize}: holds no square of {size} px, the size of the images")
        self.precision, self.batch, self.cache = precision, batch, cache
        self.keeps = dist_info.rank == 0
        self.heartbeat = heartbeat

    def __call__(self, reader: ShardReader) -> Features:
        """The features of a labelled set, complete on every rank. UserError, on all ranks, where an image of
        one cannot be read or decoded."""
        path = self.cache / f"{self._digest(reader)}.safetensors" if self.cache else None
        kept = _read(path) if path else None
        if all(all_gather_object(kept is not None)):
            return kept
        values, labels = raise_on_all_ranks(lambda: self._part(reader))
        device = self.dist_info.device
        found = Features(*(all_gather_uneven(rows.to(device)).cpu() for rows in (values, labels)))
        if path and self.keeps:
            self.keeps = _write(path, found)
        return found

    def batch_of(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, S, S) on the device -> (B, D) float32 on the device."""
        device = self.dist_info.device.type
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, self.precision == "bf16"):
            return self.model(images).float()

    def loader(self, reader: ShardReader) -> EvalLoader:
        """Of this rank's part."""
        model, dist_info = self.model, self.dist_info
        data = DataSection(image_size=model.image_size, mean=model.mean, std=model.std)
        place = dist_info.device, dist_info.rank, dist_info.world_size, dist_info.num_cpus
        return EvalLoader(reader, data, self.batch, *place, self.resize)

    def _part(self, reader: ShardReader) -> tuple[torch.Tensor, torch.Tensor]:
        loader = self.loader(reader)
        values, labels = (
            torch.empty(len(loader), self.model.width),
            torch.empty(len(loader), dtype=torch.int64),
        )
        done, began, said = 0, time.monotonic(), time.monotonic()
        for batch in loader:
            end = done + len(batch.images)
            values[done:end] = self.batch_of(batch.images)
            labels[done:end] = batch.labels
            done = end
            self.heartbeat()
            if time.monotonic() - said > INTERVAL:
                said = time.monotonic()
                rate = done / (said - began) * self.dist_info.world_size
                logger.info(
                    f"features: {done / len(loader):.0%} of {reader.num_samples} images, {rate:.0f} images/s"
                )
        return values, labels

    def _digest(self, reader: ShardReader) -> str:
        how = (self.resize, self.precision, self.batch, self.dist_info.device.type)
        content = json.dumps([VERSION, self.model.digest, reader.fingerprint, how])
        return hashlib.sha256(content.encode()).hexdigest()


def _read(path: Path) -> Features | None:
    """None where there is no such file; and where it cannot be read or is damaged, which is said."""
    try:
        with safe_open(path, "pt") as file:
            found = Features(*map(file.get_tensor, Features._fields))
            if (file.metadata() or {}).get(CHECKSUM) == _checksum(found):
                return found
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        pass
    logger.info(f"{path}: cannot be read, or is damaged: its features are extracted again")
    return None


def _write(path: Path, features: Features) -> bool:
    """False, and a line that says so, where the storage does not take them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, shared=True) as new:
            save_tensors(features._asdict(), new, {CHECKSUM: _checksum(features)})
    except (OSError, SafetensorError) as error:
        logger.info(f"features are not kept: {path.parent} cannot be written: {error}")
        return False
    return True


def _checksum(features: Features) -> str:
    found = hashlib.sha256()
    for rows in features:
        found.update(rows.contiguous().numpy())
    return found.hexdigest()
