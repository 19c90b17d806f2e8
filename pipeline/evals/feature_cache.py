"""On-disk cache of features, one safetensors file per shard set and extraction setting.

Invariant: a file is used only if its content matches the SHA-256 in its metadata.
"""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from pipeline.io.atomic import atomic_path
from pipeline.io.tensors import save_tensors

logger = logging.getLogger(__name__)

CHECKSUM = "sha256"
"""Metadata key."""


class Features(NamedTuple):
    """Features of a shard set, on the CPU, in the order of the set."""

    values: torch.Tensor
    """(N, D) float32."""
    labels: torch.Tensor
    """(N,) int64."""


class FeatureCache:
    """Directory of feature files. A failed write disables further writes; it never ends the evaluation."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._writable = True

    def load(self, key: str) -> Features | None:
        """Read the features stored under `key`; None if there are none or if the file is damaged."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                features = Features(*map(file.get_tensor, Features._fields))
                if (file.metadata() or {}).get(CHECKSUM) == _checksum(features):
                    return features
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError):
            pass
        logger.warning(f"{path}: unreadable or damaged; extracting its features again")
        return None

    def save(self, key: str, features: Features) -> None:
        """Write the features under `key`, or log that the directory is not writable."""
        if not self._writable:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._path(key), shared=True) as path:
                save_tensors(features._asdict(), path, {CHECKSUM: _checksum(features)})
        except (OSError, SafetensorError) as error:
            logger.warning(f"{self.directory}: features are not cached, the directory is not writable: {error}")
            self._writable = False

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"


def _checksum(features: Features) -> str:
    checksum = hashlib.sha256()
    for rows in features:
        checksum.update(rows.contiguous().numpy().data)
    return checksum.hexdigest()
