"""The labelled shard sets of an evaluation: one to learn from, one to be judged on.

Invariant: both name the same classes in the same order, and have no shard in common.
"""

import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError, join_names
from pipeline.recipe.sections import DataSection

logger = logging.getLogger(__name__)


class LabelledSets(NamedTuple):
    train: ShardReader
    val: ShardReader

    @property
    def classes(self) -> int:
        return len(self.train.manifest.classes)


def open_labelled_sets(train: str | Path, val: str | Path, data: DataSection) -> LabelledSets:
    """The sets in two directories or URLs; `data.subset` and `data.holdout` are of the training set.

    UserError as `check_labelled`.
    """
    whole = data.model_copy(update={"subset": 1.0, "subset_by_class": False, "holdout": 0.0})
    found = LabelledSets(ShardReader(train, data), ShardReader(val, whole))
    check_labelled(*found)
    return found


def check_labelled(train: ShardReader, val: ShardReader) -> None:
    """UserError where one has no labels, there is but one class, their classes differ, or they share a
    shard."""
    for option, reader in (("--data", train), ("--val", val)):
        if not reader.manifest.classes:
            raise UserError(
                f"{option} {reader.places[0]}: its samples have no labels; build it from a folder of class "
                "folders, or from a source with labels"
            )
    if len(train.manifest.classes) == 1:
        (only,) = train.manifest.classes
        raise UserError(
            f"--data {train.places[0]}: all its samples are of one class, {only!r}: nothing to tell apart"
        )
    where = f"--val {val.places[0]}"
    theirs, ours = val.manifest.classes, train.manifest.classes
    if theirs != ours:
        raise UserError(
            f"{where}: its classes are not those of --data {train.places[0]}: {_difference(ours, theirs)}"
        )
    digests = [{shard.sha256 for shard in reader.manifest.shards} for reader in (train, val)]
    if digests[0] & digests[1]:
        raise UserError(
            f"{where}: holds shards of --data {train.places[0]}; judge on images that were not learned"
        )


def verify_checksums(dist_info: DistInfo, **sets: ShardReader) -> None:
    """Compare sets, by the options that name them, with their checksums, each rank a part; what is not
    compared is said. Every rank calls it. AgreedError at a fault."""
    for option, reader in sets.items():
        unchecked = raise_on_all_ranks(partial(reader.check_bytes, dist_info.rank, dist_info.world_size))
        if unchecked:
            logger.info(f"--{option} {reader.places[0]}: {unchecked}")


def _difference(train: list[str], val: list[str]) -> str:
    missing, more = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    parts = []
    if missing:
        parts.append(f"{len(missing)} are missing, {join_names([*map(repr, missing)])}")
    if more:
        parts.append(f"{len(more)} are not there, {join_names([*map(repr, more)])}")
    return "; ".join(parts) or "the same names in another order"
