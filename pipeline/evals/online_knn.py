"""k-NN while a run trains: how good the features are, a few times, for a few seconds each.

Of the first samples of the run's own labelled set (a set is shuffled when it is built) a fifth are classified
by the others, on class tokens, as `python -m pipeline knn` does. Pre-training sees these images, never their
labels: it is a curve to watch, no result. Invariant: all ranks call the encoder equally often, because ZeRO-3
shares its weights.
"""

from collections.abc import Callable

import torch

from pipeline.data.crops import resize_of
from pipeline.data.evaluation import EvaluationLoader
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.evals.features import Features
from pipeline.evals.knn import classify
from pipeline.methods.method import Method
from pipeline.recipe import Recipe
from pipeline.train.distributed import World, equally_many, gathered_rows

K = 20
QUERIES = 1 / 5


class OnlineKnn:
    """Every rank has one and calls it. UserError where the set has no labels, or too few samples."""

    def __init__(self, recipe: Recipe, reader: ShardReader, method: Method, world: World) -> None:
        size = recipe.data.image_size
        check_online(recipe, reader)
        self.method, self.world = method, world
        self.classes = len(reader.manifest.classes)
        place = world.device, world.rank, world.size, recipe.data.threads or world.cores
        self.loader = EvaluationLoader(
            reader,
            recipe.data,
            recipe.engine.micro_batch,
            *place,
            resize_of(size),
            recipe.evals.knn_samples,
        )
        self.nothing = torch.zeros(1, 3, size, size, device=world.device)

    def __call__(self, alive: Callable[[], None]) -> dict[str, float]:
        """Top-1 with its interval, for metrics.jsonl. alive: called after every batch."""
        found = self._features(alive)
        queries = int(QUERIES * len(found.labels))
        train, val = Features(*(x[queries:] for x in found)), Features(*(x[:queries] for x in found))
        top1 = classify(train, val, [K], self.classes, self.world)[K]["top1"]
        low, high = top1.interval
        return {"knn_top1": top1.share, "knn_top1_low": low, "knn_top1_high": high}

    @torch.no_grad()
    def _features(self, alive: Callable[[], None]) -> Features:
        values, labels = [self.method.tokens(self.nothing)[:0, 0].float()], [torch.empty(0).long()]
        for batch in equally_many(self.loader):
            tokens = self.method.tokens(self.nothing if batch is None else batch.images)
            if batch is not None:
                values.append(tokens[:, 0].float())
                labels.append(batch.labels.cpu())
            alive()
        device = self.world.device
        rows = torch.cat(values), torch.cat(labels).to(device)
        return Features(*(gathered_rows(part).cpu() for part in rows))


def check_online(recipe: Recipe, reader: ShardReader) -> None:
    """UserError where k-NN during training is wanted and this data does not do."""
    if recipe.evals.knn_every is None:
        return
    if not reader.manifest.classes:
        raise UserError(f"evals.knn_every: {reader.places[0]} has no labels; set it to null")
    samples = min(reader.num_samples, recipe.evals.knn_samples)
    if samples - int(QUERIES * samples) < K:
        raise UserError(f"evals.knn_every: {samples} samples are too few for {K} neighbours; set it to null")
