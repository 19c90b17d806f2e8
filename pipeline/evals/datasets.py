"""Labeled shard sets for evaluation: one for training, one for validation.

Invariant: both have the same classes in the same order, and no shard in common.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError, join_names
from pipeline.recipe.sections import DataSection

logger = logging.getLogger(__name__)


class LabeledSets(NamedTuple):
    train: ShardReader
    val: ShardReader

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.manifest.classes)


def open_labeled_sets(train: str | Path, val: str | Path, data: DataSection) -> LabeledSets:
    """Open two shard sets (directories or URLs) and check that they fit together.

    `data.subset` and `data.holdout` apply to the training set only.

    Raises:
        UserError: As `check_labeled_sets`.
    """
    complete = data.model_copy(update={"subset": 1.0, "subset_by_class": False, "holdout": 0.0})
    sets = LabeledSets(ShardReader(train, data), ShardReader(val, complete))
    check_labeled_sets(*sets)
    return sets


def check_labeled(option: str, reader: ShardReader) -> None:
    """Raise UserError if a set has no labels."""
    if not reader.manifest.has_labels:
        raise UserError(
            f"{option} {reader.paths[0]}: its samples have no labels; build it from class folders or a labeled source"
        )


def check_labeled_sets(train: ShardReader, val: ShardReader) -> None:
    """Raise UserError if a set has no labels or one class only, or if classes differ or shards are shared."""
    for option, reader in (("--data", train), ("--val", val)):
        check_labeled(option, reader)
    if len(classes := train.manifest.classes) == 1:
        raise UserError(f"--data {train.paths[0]}: all samples have one class, {classes[0]!r}; give at least two")
    check_same_classes(train, val)
    check_disjoint(train, val)


def check_same_classes(train: ShardReader, val: ShardReader) -> None:
    """Raise UserError if the classes of two sets or their order differ."""
    classes, val_classes = train.manifest.classes, val.manifest.classes
    if val_classes != classes:
        raise UserError(
            f"--val {val.paths[0]}: its classes differ from those of --data {train.paths[0]}: "
            f"{_describe_difference(classes, val_classes)}"
        )


def check_disjoint(train: ShardReader, val: ShardReader) -> None:
    """Raise UserError if two sets have a shard in common."""
    checksums = [{shard.sha256 for shard in reader.manifest.shards} for reader in (train, val)]
    if checksums[0] & checksums[1]:
        raise UserError(f"--val {val.paths[0]}: shares shards with --data {train.paths[0]}; evaluate on other images")


def verify_checksums(dist_info: DistInfo, **sets: ShardReader) -> None:
    """Compare shards with the checksums of their manifests, each rank a part. Collective.

    Args:
        sets: Shard sets by the command-line option that names them.

    Raises:
        AllRanksError: If a shard differs from its manifest.
    """
    for option, reader in sets.items():
        unchecked = raise_on_all_ranks(partial(reader.verify_checksums, dist_info.rank, dist_info.world_size))
        if unchecked:
            logger.info(f"--{option} {reader.paths[0]}: {unchecked}")


def _describe_difference(train: Sequence[str], val: Sequence[str]) -> str:
    parts = []
    for name, classes in (("missing", set(train) - set(val)), ("unexpected", set(val) - set(train))):
        if classes:
            parts.append(f"{len(classes)} {name}: {join_names([*map(repr, sorted(classes))])}")
    return "; ".join(parts) or "same names, different order"
