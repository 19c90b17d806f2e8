"""k-NN while a run trains: how good the features are, a few times, for a few seconds each.

Of the first samples of the run's own labelled set (a set is shuffled when it is built) a fifth are classified
by the others, on class tokens, as `python -m pipeline knn` does. Pre-training sees these images, never their
labels: it is a curve to watch, no result. Invariant: all ranks call the encoder equally often, because ZeRO-3
shares its weights.
"""

from collections.abc import Callable

import torch

from pipeline.data.eval_loader import EvalLoader
from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import all_gather_uneven, iterate_in_lockstep
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.feature_cache import Features
from pipeline.evals.knn import classify
from pipeline.methods.method import Method
from pipeline.recipe import Recipe
from pipeline.recipe.sections import resize_of

K = 20
QUERIES = 1 / 5


class OnlineKnn:
    """Every rank has one and calls it. UserError where the set has no labels, or too few samples."""

    def __init__(self, recipe: Recipe, reader: ShardReader, method: Method, dist_info: DistInfo) -> None:
        size = recipe.data.image_size
        check_online(recipe, reader)
        self.method, self.dist_info = method, dist_info
        self.classes = len(reader.manifest.classes)
        place = (
            dist_info.device,
            dist_info.rank,
            dist_info.world_size,
            recipe.data.decode_threads or dist_info.num_cpus,
        )
        self.loader = EvalLoader(
            reader,
            recipe.data,
            recipe.engine.micro_batch,
            *place,
            resize_of(size),
            recipe.evals.knn_samples,
        )
        self.nothing = torch.zeros(1, 3, size, size, device=dist_info.device)

    def __call__(self, heartbeat: Callable[[], None]) -> dict[str, float]:
        """Top-1 with its interval, for metrics.jsonl. alive: called after every batch."""
        found = self._features(heartbeat)
        queries = int(QUERIES * len(found.labels))
        train, val = Features(*(x[queries:] for x in found)), Features(*(x[:queries] for x in found))
        top1 = classify(train, val, [K], self.classes, self.dist_info)[K]["top1"]
        low, high = top1.interval
        return {"knn_top1": top1.share, "knn_top1_low": low, "knn_top1_high": high}

    @torch.no_grad()
    def _features(self, heartbeat: Callable[[], None]) -> Features:
        values, labels = [self.method.tokens(self.nothing)[:0, 0].float()], [torch.empty(0).long()]
        for batch in iterate_in_lockstep(self.loader):
            tokens = self.method.tokens(self.nothing if batch is None else batch.images)
            if batch is not None:
                values.append(tokens[:, 0].float())
                labels.append(batch.labels.cpu())
            heartbeat()
        device = self.dist_info.device
        rows = torch.cat(values), torch.cat(labels).to(device)
        return Features(*(all_gather_uneven(part).cpu() for part in rows))


def check_online(recipe: Recipe, reader: ShardReader) -> None:
    """UserError where k-NN during training is wanted and this data does not do."""
    if recipe.evals.knn_every is None:
        return
    if not reader.manifest.classes:
        raise UserError(f"evals.knn_every: {reader.places[0]} has no labels; set it to null")
    samples = min(reader.num_samples, recipe.evals.knn_samples)
    if samples - int(QUERIES * samples) < K:
        raise UserError(f"evals.knn_every: {samples} samples are too few for {K} neighbours; set it to null")
