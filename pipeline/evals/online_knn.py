"""k-NN accuracy during pre-training, to monitor feature quality.

The first samples of the run's own labeled set (shuffled when it was built) are split: a fifth is classified by the
rest, on class tokens, as `python -m pipeline knn` does. Pre-training sees these images but never their labels, so
the curve is for monitoring, not a result.
Invariant: all ranks call the encoder equally often, because ZeRO-3 partitions its weights.
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
from pipeline.recipe.sections import eval_resize_size

K = 20
QUERY_SHARE = 1 / 5


class OnlineKnn:
    """Evaluates a method on its own training set. Every rank creates one and calls it.

    Raises:
        UserError: If the set has no labels or too few samples.
    """

    def __init__(self, recipe: Recipe, reader: ShardReader, method: Method, dist_info: DistInfo) -> None:
        check_knn_data(recipe, reader)
        size = recipe.data.image_size
        self.method, self.dist_info = method, dist_info
        self.num_classes = len(reader.manifest.classes)
        place = dist_info.device, dist_info.rank, dist_info.world_size
        threads, resize = recipe.data.decode_threads or dist_info.num_cpus, eval_resize_size(size)
        options = recipe.engine.micro_batch, *place, threads, resize, recipe.evals.knn_samples
        self.loader = EvalLoader(reader, recipe.data, *options, deterministic=recipe.engine.deterministic)
        self.dummy_batch = torch.zeros(1, 3, size, size, device=dist_info.device)

    def __call__(self, heartbeat: Callable[[], None]) -> dict[str, float]:
        """Return top-1 accuracy and its interval as columns of metrics.jsonl; call `heartbeat` after each batch."""
        features = self._extract(heartbeat)
        split = int(QUERY_SHARE * len(features.labels))
        queries, train = Features(*(x[:split] for x in features)), Features(*(x[split:] for x in features))
        top1 = classify(train, queries, [K], self.num_classes, self.dist_info)[K]["top1"]
        low, high = top1.interval
        return {"knn_top1": top1.share, "knn_top1_low": low, "knn_top1_high": high}

    @torch.no_grad()
    def _extract(self, heartbeat: Callable[[], None]) -> Features:
        # One dummy batch, of which no row is kept, gives a rank without samples tensors of the right width.
        values = [self.method.forward_features(self.dummy_batch)[:0, 0].float()]
        labels = [torch.empty(0).long()]
        for batch in iterate_in_lockstep(self.loader):
            tokens = self.method.forward_features(self.dummy_batch if batch is None else batch.images)
            if batch is not None:
                assert batch.labels is not None
                values.append(tokens[:, 0].float())
                labels.append(batch.labels.cpu())
            heartbeat()
        rows = torch.cat(values), torch.cat(labels).to(self.dist_info.device)
        return Features(*(all_gather_uneven(part).cpu() for part in rows))


def check_knn_data(recipe: Recipe, reader: ShardReader) -> None:
    """Raise UserError if k-NN during training is enabled and the data has no labels or too few samples."""
    if recipe.evals.knn_every is None:
        return
    if not reader.manifest.has_labels:
        raise UserError(f"evals.knn_every: {reader.paths[0]} has no labels; set the key to null")
    samples = min(reader.num_samples, recipe.evals.knn_samples)
    if samples - int(QUERY_SHARE * samples) < K:
        raise UserError(f"evals.knn_every: {samples} samples are too few for {K} neighbors; set it to null")
