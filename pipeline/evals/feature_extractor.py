"""Feature extraction: every sample of a shard set through a frozen encoder, split over the ranks.

Invariant: batches do not depend on the number of ranks, so features do not either.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from pipeline.data.eval_loader import EvalLoader
from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import all_gather_object, all_gather_uneven, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.feature_cache import FeatureCache, Features
from pipeline.evals.frozen_encoder import FrozenEncoder
from pipeline.evals.progress import progress_bar
from pipeline.recipe.sections import DataSection, eval_resize_size

Precision = Literal["fp32", "bf16"]
VERSION = 1
"""Part of the cache key; raise it when the same weights and images give other features."""
BATCH = 128


class FeatureExtractor:
    """Computes the features of shard sets with one encoder. Every rank creates one and calls it.

    Args:
        resize: Shorter side in pixels before the center crop; None: `eval_resize_size` (MAE's evaluation).
        batch: Images per forward pass.
        cache: Directory for features; None: features are not cached.
        heartbeat: Called after every batch.

    Raises:
        UserError: If `resize` is smaller than the image size.
    """

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
        self.model, self.dist_info = model.to(dist_info.device), dist_info
        self.resize = resize or eval_resize_size(model.image_size)
        if self.resize < model.image_size:
            raise UserError(f"--resize {resize}: smaller than the image size, {model.image_size} px")
        self.precision, self.batch, self.heartbeat = precision, batch, heartbeat
        self._cache = FeatureCache(cache) if cache else None

    def __call__(self, reader: ShardReader) -> Features:
        """Return all features of a labeled shard set, from the cache or the encoder, on every rank. Collective.

        Raises:
            AllRanksError: If an image cannot be read or decoded.
        """
        key = self._cache_key(reader) if self._cache else ""
        cached = self._cache.load(key) if self._cache else None
        if all(all_gather_object(cached is not None)):
            assert cached is not None
            return cached
        local = raise_on_all_ranks(lambda: self._extract_local(reader))
        features = Features(*(all_gather_uneven(rows, self.dist_info.device) for rows in local))
        if self._cache and self.dist_info.rank == 0:
            self._cache.save(key, features)
        return features

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, S, S) on the device to features (B, D) float32 on the device."""
        device = self.dist_info.device.type
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, self.precision == "bf16"):
            return self.model(images).float()

    def loader(self, reader: ShardReader) -> EvalLoader:
        """Return the loader of this rank's part of a shard set."""
        model, (rank, world_size, _, _, device, num_cpus) = self.model, self.dist_info
        data = DataSection(image_size=model.image_size, mean=model.mean, std=model.std)
        return EvalLoader(reader, data, self.batch, device, rank, world_size, num_cpus, self.resize)

    def _extract_local(self, reader: ShardReader) -> Features:
        loader = self.loader(reader)
        values = torch.empty(len(loader), self.model.width)
        labels = torch.empty(len(loader), dtype=torch.int64)
        done = 0
        with progress_bar("features", reader.num_samples) as bar:
            for batch in loader:
                assert batch.labels is not None
                end = done + len(batch.images)
                values[done:end] = self.encode(batch.images)
                labels[done:end] = batch.labels
                bar.update((end - done) * reader.num_samples / len(loader))
                done = end
                self.heartbeat()
        return Features(values, labels)

    def _cache_key(self, reader: ShardReader) -> str:
        settings = (self.resize, self.precision, self.batch, self.dist_info.device.type)
        content = json.dumps([VERSION, self.model.digest, reader.fingerprint, settings])
        return hashlib.sha256(content.encode()).hexdigest()
