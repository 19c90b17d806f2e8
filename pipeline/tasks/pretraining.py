"""Pre-training task: train a recipe's method and draw its reconstructions."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError, UserError
from pipeline.estimate.plan import pretraining_limits
from pipeline.evals.frozen_encoder import module_digest
from pipeline.evals.online_knn import OnlineKnn, check_knn_data
from pipeline.io.atomic import atomic_path, read_json, write_json
from pipeline.methods import Method, build_method
from pipeline.methods.flops import forward_flops
from pipeline.methods.targets import TokenTarget
from pipeline.models.trainable_module import TrainableModule
from pipeline.pictures.images import load_first_images
from pipeline.pictures.reconstruction import plot_reconstruction
from pipeline.recipe import Recipe
from pipeline.train import checkpoint
from pipeline.train.micro_batch import MicroBatchLimits
from pipeline.train.run_directory import RunDirectory
from pipeline.train.task import Task
from pipeline.train.trainer import Trainer
from pipeline.weights.tokenizer import attach_tokenizer

logger = logging.getLogger(__name__)

NUM_IMAGES = 4
"""Images of the shard set whose reconstruction is drawn at every checkpoint."""


def pretrain(
    recipe: Recipe,
    data: Sequence[str],
    run: Path,
    build: Callable[[Recipe], Method] = build_method,
    deepspeed_config: Path | None = None,
) -> None:
    """Pre-train a recipe; the arguments and errors are those of `pipeline.train.trainer.Trainer`.

    Args:
        build: Builds the method; replace it to train a method that recipes do not offer.
    """
    Trainer(Pretraining(recipe, build), data, RunDirectory(run), deepspeed_config).train()


class Pretraining(Task[Recipe]):
    def __init__(self, recipe: Recipe, build: Callable[[Recipe], Method] = build_method) -> None:
        self.recipe, self._build_method = recipe, build

    @property
    def description(self) -> str:
        return f"{self.recipe.method.name} on {self.recipe.model.name}"

    def build(self, reader: ShardReader) -> Method:
        check_knn_data(self.recipe, reader)
        method = self._build_method(self.recipe)
        attach_tokenizer(method, self.recipe)
        return method

    def num_parameters(self, reader: ShardReader) -> int:
        check_knn_data(self.recipe, reader)
        with torch.device("meta"):
            return sum(p.numel() for p in self._build_method(self.recipe).parameters())

    def forward_flops(self) -> float:
        return forward_flops(self.recipe, self.recipe.engine.micro_batch)

    def micro_batch_limits(self, reader: ShardReader, world_size: int, available_gib: float) -> MicroBatchLimits:
        return pretraining_limits(self.recipe, world_size, available_gib)

    def setup(self, run: RunDirectory, reader: ShardReader, module: TrainableModule, dist_info: DistInfo) -> None:
        assert isinstance(module, Method)
        self._method, self._is_writer = module, dist_info.rank == 0
        raise_on_all_ranks(lambda: self._check_tokenizer(run, module))
        images = raise_on_all_ranks(lambda: load_first_images(reader, NUM_IMAGES, self.recipe.data))
        self._images = images.to(dist_info.device)
        if count := module.target.num_images:
            module.target.fit(raise_on_all_ranks(lambda: load_first_images(reader, count, self.recipe.data)))
        module.target.to(dist_info.device)
        self._pictures = run.reconstructions
        self._pictures.mkdir(exist_ok=True)
        self._knn = OnlineKnn(self.recipe, reader, module, dist_info) if self.recipe.evals.knn_every else None
        self._last_error: str | None = None

    def _check_tokenizer(self, run: RunDirectory, method: Method) -> None:
        """Store the digest of the tokenizer's weights. Raises UserError if the run was started with others."""
        if not isinstance(method.target, TokenTarget) or method.target.tokenizer.codebook is None:
            return
        digest, path = module_digest(method.target.tokenizer.codebook), run.tokenizer
        if path.exists():
            started_with = read_json(path).get("digest")
            if started_with != digest:
                raise UserError(
                    f"method.target.tokenizer: {self.recipe.method.target.tokenizer} has other weights than those this "
                    f"run was started with ({path}); restore them, or give a new --run"
                )
        elif self._is_writer:
            write_json(path, {"digest": digest})

    def save_images(self, step: int) -> None:
        # All ranks run the forward pass: ZeRO-3 shards the weights.
        picture = plot_reconstruction(self._method, self.recipe, self._images, self.recipe.seed)
        if self._is_writer:
            with atomic_path(self._pictures / f"{checkpoint.checkpoint_name(step)}.png") as path:
                picture.save(path, "PNG")

    def should_evaluate(self, step: int, total_steps: int, num_samples: int) -> bool:
        every = self.recipe.evals.knn_every
        return every is not None and step % every == 0

    def evaluate(self, step: int, heartbeat: Callable[[], None]) -> dict:
        assert self._knn is not None
        # k-NN is only monitored: an undecodable image, which training substitutes, must not stop the run.
        try:
            return self._knn(heartbeat)
        except AllRanksError as error:
            if str(error) != self._last_error:
                logger.warning(f"evals.knn_every: not measured at step {step}, training continues: {error}")
            self._last_error = str(error)
            return {}
