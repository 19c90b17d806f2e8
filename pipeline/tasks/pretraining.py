"""Pre-training as the loop's task: a recipe's method, and pictures of what it reconstructs."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError
from pipeline.evals.online_knn import OnlineKnn, check_online
from pipeline.io.atomic import atomic_path
from pipeline.methods import Method, build_method
from pipeline.methods.flops import forward_flops
from pipeline.pictures.images import first_of_set
from pipeline.pictures.reconstruction import plot_reconstruction
from pipeline.recipe import Recipe
from pipeline.train import checkpoint
from pipeline.train.task import Task
from pipeline.train.trainer import train

logger = logging.getLogger(__name__)

SHOWN = 4
"""Images of the shard set whose reconstruction is drawn at every checkpoint."""


def pretrain(
    recipe: Recipe,
    data: Sequence[str],
    run: Path,
    build: Callable[[Recipe], Method] = build_method,
    deepspeed_config: Path | None = None,
) -> None:
    """Pre-train `recipe` as `train` says. build: makes the method, for experiments with one that no recipe
    names."""
    train(Pretraining(recipe, build), data, run, deepspeed_config)


class Pretraining(Task):
    def __init__(self, recipe: Recipe, build: Callable[[Recipe], Method] = build_method):
        self.recipe, self._build = recipe, build

    @property
    def title(self) -> str:
        return f"{self.recipe.method.name} on {self.recipe.model.name}"

    def build(self, reader: ShardReader) -> Method:
        check_online(self.recipe, reader)
        return self._build(self.recipe)

    def parameters(self, reader: ShardReader) -> int:
        with torch.device("meta"):
            return super().parameters(reader)

    def forward_flops(self) -> float:
        return forward_flops(self.recipe, self.recipe.engine.micro_batch)

    def begin(self, run: Path, reader: ShardReader, method: Method, dist_info: DistInfo) -> None:
        self._method, self._writes = method, dist_info.rank == 0
        self._shown = raise_on_all_ranks(lambda: first_of_set(reader, SHOWN, self.recipe.data)).to(
            dist_info.device
        )
        self._pictures = run / "reconstructions"
        self._pictures.mkdir(exist_ok=True)
        self._knn = OnlineKnn(self.recipe, reader, method, dist_info) if self.recipe.evals.knn_every else None
        self._said: str | None = None

    def show(self, step: int) -> None:
        # Drawn by all ranks: ZeRO-3 shares the weights.
        drawn = plot_reconstruction(self._method, self.recipe, self._shown, self.recipe.seed)
        if self._writes:
            with atomic_path(self._pictures / f"{checkpoint.checkpoint_name(step)}.png") as new:
                drawn.save(new, "PNG")

    def evaluates(self, step: int, total_steps: int, num_samples: int) -> bool:
        every = self.recipe.evals.knn_every
        return every is not None and step % every == 0

    def evaluate(self, step: int, heartbeat: Callable[[], None]) -> dict:
        # A curve to watch: an image that training replaces is no reason to stop for it.
        try:
            return self._knn(heartbeat)
        except AllRanksError as error:
            if str(error) != self._said:
                logger.info(f"evals.knn_every: not measured at step {step}, and the run goes on: {error}")
            self._said = str(error)
            return {}
