"""Instances of shard sets for detection: which samples are used, and the transforms of the loaders.

Invariant: every annotation of the training set is parsed before the first step. Images without an instance are left
out of training and kept in validation, as in detectron2.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.instances import Annotation, is_unlisted, parse_annotation, place_instance
from pipeline.data.large_scale_jitter import fit, jitter
from pipeline.data.placement import Placement, Target
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError, join_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainTransform:
    """Makes the targets of `MaskRCNN.compute_losses`, with large-scale jitter."""

    seed: int
    side: int
    """Of the canvas, in pixels."""
    scale: tuple[float, float]
    flip: bool
    label_of: dict[int, int]
    """Label, from 1 on, of each of COCO's category ids."""
    extension: str = "json"

    def __call__(
        self, annotation: np.ndarray, image_size: tuple[int, int], epoch: int, sample_id: int
    ) -> tuple[Placement, Target]:
        placement = jitter(self.seed, epoch, sample_id, image_size, self.side, self.scale, self.flip)
        boxes, masks, labels = [], [], []
        for instance in parse_annotation(annotation, image_size).instances:
            placed = None if instance.is_crowd else place_instance(instance, placement)
            if placed is not None:
                boxes.append(placed[0])
                masks.append(placed[1])
                labels.append(self.label_of[instance.category_id])
        width, height = placement.extent
        target = {
            "boxes": torch.tensor(np.array(boxes), dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(np.stack(masks) if masks else np.zeros((0, self.side, self.side), np.uint8)),
            "size": (height, width),
        }
        return placement, target


@dataclass(frozen=True)
class EvalTransform:
    """Places images for evaluation; the target holds the image's id."""

    side: int
    extension: str = "json"

    def __call__(
        self, annotation: np.ndarray, image_size: tuple[int, int], epoch: int, sample_id: int
    ) -> tuple[Placement, Target]:
        image_id = parse_annotation(annotation, image_size).image_id
        return fit(image_size, self.side), {"image_id": image_id}


def check_instances(option: str, reader: ShardReader) -> None:
    """Raise UserError if a set has no instances by its manifest."""
    if reader.manifest.annotation != "instances" or not reader.manifest.classes:
        raise UserError(
            f"{option} {reader.paths[0]}: its samples have no instances; build it with `python -m data_prep coco`"
        )


def check_categories(train: ShardReader, val: ShardReader) -> None:
    """Raise UserError if the categories of two sets differ in name or id."""
    of_train, of_val = (set(zip(r.manifest.category_ids, r.manifest.classes, strict=True)) for r in (train, val))
    if differing := sorted(of_train ^ of_val):
        listed = join_names([f"{name} ({number})" for number, name in differing])
        raise UserError(
            f"--val {val.paths[0]}: its categories are not those of --data {train.paths[0]}: {listed}; build both "
            "from the same release"
        )


def read_annotations(reader: ShardReader) -> Iterator[list[Annotation | None]]:
    """Yield the annotations of each shard; None for images that the annotation file does not list.

    Raises:
        UserError: If one is damaged or has an unknown category.
    """
    known = set(reader.manifest.category_ids)

    def read(shard: int) -> list[Annotation | None]:
        annotations = []
        indexes = range(int(reader.shard_sizes[shard]))
        for index, data in enumerate(reader.read_many(shard, indexes, "json")):
            try:
                if is_unlisted(data):
                    annotations.append(None)
                    continue
                annotation = parse_annotation(data)
                if unknown := {instance.category_id for instance in annotation.instances} - known:
                    raise ValueError(f"category {min(unknown)} is not in the manifest")
            except ValueError as error:
                raise UserError(
                    f"{reader.shard_path(shard)}, sample {reader.key(shard, index)!r}: {error}; build the shard set "
                    "again"
                ) from error
            annotations.append(annotation)
        return annotations

    with ThreadPoolExecutor(reader.data.read_threads) as pool:
        yield from pool.map(read, range(len(reader.shard_sizes)))


def select_annotated(reader: ShardReader) -> None:
    """Leave out the images without an instance that can be trained on, and log what is left out and skipped.

    Raises:
        UserError: If no image is left, or an annotation is damaged.
    """
    keep, skipped, crowds = [], Counter(), 0
    for of_shard in read_annotations(reader):
        keep.append(np.array([a is not None and any(not i.is_crowd for i in a.instances) for a in of_shard], bool))
        annotations = [annotation for annotation in of_shard if annotation]
        skipped += sum((annotation.skipped for annotation in annotations), Counter())
        crowds += sum(instance.is_crowd for annotation in annotations for instance in annotation.instances)
    total, kept = sum(map(len, keep)), int(sum(map(np.sum, keep)))
    where = f"--data {reader.paths[0]}"
    if not kept:
        reasons = f" (skipped: {_join_reasons(skipped)})" if skipped else ""
        raise UserError(
            f"{where}: none of its {total} images has an instance that can be trained on{reasons}; give another set"
        )
    if kept < total:
        reader.filter_samples(keep)
        logger.info(f"{where}: {total - kept} of {total} images are left out: they have no instance")
    if crowds:
        logger.info(f"{where}: {crowds} crowd regions are not trained on")
    log_skipped(where, skipped)


def leave_out_unlisted(option: str, reader: ShardReader) -> None:
    """Leave out the images that the annotation file does not list, and log their number.

    Raises:
        UserError: If no image is left, or an annotation is damaged.
    """
    keep = [
        np.array([annotation is not None for annotation in of_shard], bool) for of_shard in read_annotations(reader)
    ]
    total, kept = sum(map(len, keep)), int(sum(map(np.sum, keep)))
    if not kept:
        raise UserError(f"{option} {reader.paths[0]}: the annotation file lists none of its images; give another set")
    if kept < total:
        reader.filter_samples(keep)
        logger.warning(
            f"{option} {reader.paths[0]}: {total - kept} of {total} images are left out: the annotation file does not "
            "list them"
        )


def log_skipped(where: str, skipped: Counter[str]) -> None:
    """Log how many instances were skipped, and why."""
    if skipped:
        logger.warning(f"{where}: skipped {sum(skipped.values())} instances: {_join_reasons(skipped)}")


def _join_reasons(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
