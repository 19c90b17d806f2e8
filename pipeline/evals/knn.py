"""`python -m pipeline knn`: weighted nearest neighbours on frozen features, the protocol of DINO.

Features are normalised to length one; the k training images of the largest cosine vote for their class, each
with weight exp(cosine / 0.07) (Wu et al. 2018, Caron et al. 2021). Nothing is trained and nothing is chosen.
Invariant: blocks of queries are the same whatever the number of ranks, so the result is, to the last sample.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from pipeline.distributed.collectives import all_gather_object, init_distributed, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.accuracy import Accuracy, count_topk_correct, topk_accuracies
from pipeline.evals.datasets import open_labelled_sets, verify_checksums
from pipeline.evals.feature_cache import FeatureExtractor, Features
from pipeline.evals.feature_extractor import Pool, load_frozen_encoder
from pipeline.recipe.sections import DataSection

KS = (5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
TIMEOUT_MINUTES = 30.0
QUERIES, NEIGHBOURS = 512, 1 << 16
"""Cosines of so many queries and training images are held at once; a rank takes whole blocks of queries."""


def knn(
    weights: str,
    train: str,
    val: str,
    *,
    ks: Sequence[int] | None = None,
    labels: float | None = None,
    image_size: int | None = None,
    pool: Pool = "class_token",
    block: int = QUERIES,
    **extraction,
) -> dict:
    """Judge `weights` on the shard set `val` by their neighbours in `train`; every rank calls it.

    ks: neighbours that vote; None: those of KS that the training set has. labels: use only this share of the
    training set's labels, class-balanced. block: of queries. extraction: options of `Extractor`. Returns what
    is printed, for JSON. UserError for what the user can mend.
    """
    with init_distributed(TIMEOUT_MINUTES) as dist_info:
        model = raise_on_all_ranks(lambda: load_frozen_encoder(weights, image_size, pool))
        few = {"subset": labels, "subset_by_class": True} if labels else {}
        sets = raise_on_all_ranks(lambda: open_labelled_sets(train, val, DataSection(**few)))
        ks = raise_on_all_ranks(lambda: _possible(ks, sets.train.num_samples))
        verify_checksums(dist_info, data=sets.train, val=sets.val)
        extract = FeatureExtractor(model, dist_info, **extraction)
        features, queries = extract(sets.train), extract(sets.val)
        found = classify(features, queries, ks, sets.classes, dist_info, block)
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
        "knn": [{"k": k, **{name: a.as_json() for name, a in found[k].items()}} for k in ks],
    }


def classify(
    train: Features, val: Features, ks: Sequence[int], classes: int, dist_info: DistInfo, block: int = QUERIES
) -> dict[int, dict[str, Accuracy]]:
    """For each k the accuracy on `val`, the same on every rank. block: of queries."""
    counts = all_gather_object(counted(train, val, ks, classes, dist_info, block))
    total = len(val.labels)
    return {
        k: topk_accuracies(*map(sum, zip(*(c[k] for c in counts), strict=True)), total, classes) for k in ks
    }


def counted(
    train: Features, val: Features, ks: Sequence[int], classes: int, dist_info: DistInfo, block: int = QUERIES
) -> dict[int, tuple[int, int]]:
    """For each k the `hits` in this rank's blocks of `val`."""
    blocks = -(-len(val.labels) // block)
    first, end = (
        block * (blocks * part // dist_info.world_size) for part in (dist_info.rank, dist_info.rank + 1)
    )
    similarity, voters = nearest(train, val.values[first:end], max(ks), dist_info.device, block)
    truth = val.labels[first:end].to(dist_info.device)
    counts = {k: (0, 0) for k in ks}
    for start in range(0, len(truth), block):
        part = slice(start, start + block)
        for k in ks:
            scores = votes(similarity[part, :k], voters[part, :k], classes)
            counts[k] = tuple(map(sum, zip(counts[k], count_topk_correct(scores, truth[part]), strict=True)))
    return counts


def nearest(
    train: Features,
    queries: torch.Tensor,
    k: int,
    device: torch.device,
    block: int = QUERIES,
    neighbours: int = NEIGHBOURS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and class of the k nearest training images of each query (Q, D): (Q, k) both, nearest first.

    block, neighbours: queries and training images that are looked at together, which changes nothing but
    memory, time and roundings."""
    queries = F.normalize(queries.to(device), dim=1)
    similarity = queries.new_empty(len(queries), 0)
    classes = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for start in range(0, len(train.values), neighbours):
        values = F.normalize(train.values[start : start + neighbours].to(device), dim=1)
        labels = train.labels[start : start + neighbours].to(device)
        merged = [
            _best(similarity[part], classes[part], queries[part] @ values.T, labels, k)
            for part in (slice(at, at + block) for at in range(0, len(queries), block))
        ]
        if merged:
            similarity, classes = (torch.cat(parts) for parts in zip(*merged, strict=True))
    return similarity, classes


def votes(similarity: torch.Tensor, classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Score of every class, float64 (Q, C), by neighbours (Q, k); minus infinity where none votes for it."""
    weight = (similarity.double() / TEMPERATURE).exp()
    scores = weight.new_zeros(len(weight), num_classes).scatter_add_(1, classes, weight)
    return scores.masked_fill(scores == 0, -torch.inf)


def format_knn(result: dict) -> str:
    """A table for people."""
    train, val = result["train"], result["val"]
    share = "" if train["labels"] == 1 else f" ({train['labels']:g} of the labels, class-balanced)"
    lines = [
        f"{result['features']}: {train['samples']} training images{share}, {val['samples']} to be judged, "
        f"{result['classes']} classes",
        "    k   top-1 [95 % interval]" + "     top-5" * ("top5" in result["knn"][0]),
    ]
    for row in result["knn"]:
        cells = [
            Accuracy(row[name]["correct"], row[name]["total"]) for name in ("top1", "top5") if name in row
        ]
        lines.append(f"{row['k']:5d}  " + "   ".join(map(str, cells)))
    return "\n".join(lines)


def _possible(ks: Sequence[int] | None, samples: int) -> list[int]:
    if ks is None:
        return [k for k in KS if k <= samples] or [samples]
    if max(ks) > samples:
        raise UserError(f"--k {max(ks)}: there are {samples} training images")
    return sorted(set(ks))


def _best(
    similarity: torch.Tensor, classes: torch.Tensor, more: torch.Tensor, labels: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of those found and of `more` (Q, T), whose classes are `labels` (T,)."""
    both = torch.cat([similarity, more], dim=1)
    best, where = both.topk(min(k, both.shape[1]), dim=1)
    of_all = torch.cat([classes, labels.expand(len(more), -1)], dim=1)
    return best, of_all.gather(1, where)
