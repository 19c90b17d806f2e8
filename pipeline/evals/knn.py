"""Weighted k-nearest-neighbor classification of frozen features (`python -m pipeline knn`).

Protocol of DINO (Caron et al. 2021, after Wu et al. 2018): features are normalized to length one; the k training
images with the largest cosine vote for their class with weight exp(cosine / 0.07). Nothing is trained or tuned.
Invariant: blocks of queries do not depend on the number of ranks, so results do not either.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from pipeline.distributed.collectives import all_gather_object, init_distributed, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.accuracy import Accuracy, count_topk_correct, topk_accuracies
from pipeline.evals.datasets import open_labeled_sets, verify_checksums
from pipeline.evals.feature_cache import Features
from pipeline.evals.feature_extractor import FeatureExtractor
from pipeline.evals.frozen_encoder import Pool, load_frozen_encoder
from pipeline.evals.progress import progress_bar
from pipeline.recipe.sections import DataSection

KS = (5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
TIMEOUT_MINUTES = 30.0
BLOCK, TRAIN_BLOCK = 512, 1 << 16
"""Queries and training images per matrix of cosines. A rank processes whole blocks of queries."""


def knn(
    weights: str,
    train: str,
    val: str,
    *,
    ks: Sequence[int] | None = None,
    labels: float | None = None,
    image_size: int | None = None,
    pool: Pool = "class_token",
    block: int = BLOCK,
    **extraction,
) -> dict:
    """Classify the labeled shard set `val` by its neighbors in `train`. Collective.

    Args:
        weights: Encoder, as `load_frozen_encoder` takes it, with `image_size` and `pool`.
        ks: Numbers of neighbors; None: those of KS that the training set has.
        labels: Share of the training set's labels to use, class-balanced; None: all.
        block: Queries per block.
        extraction: Options of `FeatureExtractor`.

    Returns:
        Settings, counts and accuracies, serializable as JSON.

    Raises:
        AllRanksError: If an argument, the weights or a shard set is not usable.
    """
    with init_distributed(TIMEOUT_MINUTES) as dist_info:
        model = raise_on_all_ranks(lambda: load_frozen_encoder(weights, image_size, pool))
        data = DataSection() if labels is None else DataSection(subset=labels, subset_by_class=True)
        sets = raise_on_all_ranks(lambda: open_labeled_sets(train, val, data))
        ks = raise_on_all_ranks(lambda: _choose_ks(ks, sets.train.num_samples))
        verify_checksums(dist_info, data=sets.train, val=sets.val)
        extract = FeatureExtractor(model, dist_info, **extraction)
        features, queries = extract(sets.train), extract(sets.val)
        accuracies = classify(features, queries, ks, sets.classes, dist_info, block)
    return {
        "weights": weights,
        "features": model.name,
        "image_size": model.image_size,
        "resize": extract.resize,
        "precision": extract.precision,
        "train": {"data": train, "samples": len(features.labels), "labels": labels or 1.0},
        "val": {"data": val, "samples": len(queries.labels)},
        "classes": sets.classes,
        "temperature": TEMPERATURE,
        "knn": [{"k": k, **{name: a.as_json() for name, a in accuracies[k].items()}} for k in ks],
    }


def classify(
    train: Features, val: Features, ks: list[int], num_classes: int, dist_info: DistInfo, block: int = BLOCK
) -> dict[int, dict[str, Accuracy]]:
    """Return for each k the top-1 and top-5 accuracy on `val`, the same on every rank. Collective."""
    counts = all_gather_object(count_correct(train, val, ks, num_classes, dist_info, block))
    accuracies = {}
    for k in ks:
        top1, top5 = (sum(column) for column in zip(*(local[k] for local in counts), strict=True))
        accuracies[k] = topk_accuracies(top1, top5, len(val.labels), num_classes)
    return accuracies


def count_correct(
    train: Features, val: Features, ks: list[int], num_classes: int, dist_info: DistInfo, block: int = BLOCK
) -> dict[int, tuple[int, int]]:
    """Count for each k the top-1 and top-5 correct queries in this rank's blocks of `val`."""
    rank, world_size, device = dist_info.rank, dist_info.world_size, dist_info.device
    blocks = -(-len(val.labels) // block)
    start, end = (block * (blocks * part // world_size) for part in (rank, rank + 1))
    labels = val.labels[start:end].to(device)
    cosines, classes = nearest_neighbors(train, val.values[start:end].to(device), max(ks), block)
    counts = {k: (0, 0) for k in ks}
    for rows in zip(cosines.split(block), classes.split(block), labels.split(block), strict=True):
        for k in ks:
            top1, top5 = count_topk_correct(score_classes(rows[0][:, :k], rows[1][:, :k], num_classes), rows[2])
            counts[k] = counts[k][0] + top1, counts[k][1] + top5
    return counts


def nearest_neighbors(
    train: Features, queries: torch.Tensor, k: int, block: int = BLOCK, train_block: int = TRAIN_BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k training images with the largest cosine to each query (Q, D), on the device of the queries.

    The sizes of the blocks affect memory, speed and rounding only.

    Returns:
        Cosines and classes of the neighbors, (Q, k) each, nearest first.
    """
    device, queries = queries.device, F.normalize(queries, dim=1)
    cosines, classes = queries.new_empty(len(queries), 0), train.labels.new_empty(len(queries), 0, device=device)
    with progress_bar("k-NN", len(queries)) as bar:
        for values, labels in zip(train.values.split(train_block), train.labels.split(train_block), strict=True):
            values, labels = F.normalize(values.to(device), dim=1), labels.to(device)
            merged = []
            for rows in zip(queries.split(block), cosines.split(block), classes.split(block), strict=True):
                merged.append(_merge_topk(rows[1], rows[2], rows[0] @ values.T, labels, k))
                bar.update(len(rows[0]) * len(values) / len(train.values))
            cosines, classes = (torch.cat(parts) for parts in zip(*merged, strict=True))
    return cosines, classes


def score_classes(cosines: torch.Tensor, classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Score the classes by neighbors (Q, k): float64 (Q, C), minus infinity for classes without a vote."""
    weights = (cosines.double() / TEMPERATURE).exp()
    scores = weights.new_zeros(len(weights), num_classes).scatter_add_(1, classes, weights)
    return scores.masked_fill(scores == 0, -torch.inf)


def format_knn(result: dict) -> str:
    """Format the result of `knn` as a table."""
    train, val = result["train"], result["val"]
    share = "" if train["labels"] == 1 else f" ({train['labels']:g} of the labels, class-balanced)"
    lines = [
        f"{result['features']}: {train['samples']} training images{share}, "
        f"{val['samples']} validation images, {result['classes']} classes",
        "    k   top-1 [95 % interval]" + "     top-5" * ("top5" in result["knn"][0]),
    ]
    for row in result["knn"]:
        counts = [(row[name]["correct"], row[name]["total"]) for name in ("top1", "top5") if name in row]
        lines.append(f"{row['k']:5d}  " + "   ".join(str(Accuracy(*count)) for count in counts))
    return "\n".join(lines)


def _choose_ks(ks: Sequence[int] | None, samples: int) -> list[int]:
    if ks is None:
        return [k for k in KS if k <= samples] or [samples]
    if max(ks) > samples:
        raise UserError(f"--k {max(ks)}: more than the {samples} training images")
    return sorted(set(ks))


def _merge_topk(
    cosines: torch.Tensor, classes: torch.Tensor, block: torch.Tensor, labels: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the neighbors found so far with a block of cosines (Q, T) to images of classes `labels` (T,)."""
    best, index = torch.cat([cosines, block], dim=1).topk(min(k, cosines.shape[1] + len(labels)), dim=1)
    candidates = torch.cat([classes, labels.expand(len(block), -1)], dim=1)
    return best, candidates.gather(1, index)
