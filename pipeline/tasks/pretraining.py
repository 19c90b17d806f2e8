"""Pre-training as the loop's task: a recipe's method, and pictures of what it reconstructs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline.data.reader import ShardReader
from pipeline.errors import AgreedError
from pipeline.evals.online import OnlineKnn, check_online
from pipeline.evals.photographs import first_of_set
from pipeline.evals.picture import picture
from pipeline.methods import Method, build_method
from pipeline.plan import forward_flops
from pipeline.recipe import Recipe
from pipeline.train import checkpoint
from pipeline.train.distributed import World, agreed, say
from pipeline.train.loop import train
from pipeline.train.task import Task
from pipeline.whole_file import replacing

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

    def begin(self, run: Path, reader: ShardReader, method: Method, world: World) -> None:
        self._method, self._writes = method, world.rank == 0
        self._shown = agreed(lambda: first_of_set(reader, SHOWN, self.recipe.data)).to(world.device)
        self._pictures = run / "reconstructions"
        self._pictures.mkdir(exist_ok=True)
        self._knn = OnlineKnn(self.recipe, reader, method, world) if self.recipe.evals.knn_every else None
        self._said: str | None = None

    def show(self, step: int) -> None:
        # Drawn by all ranks: ZeRO-3 shares the weights.
        drawn = picture(self._method, self.recipe, self._shown, self.recipe.seed)
        if self._writes:
            with replacing(self._pictures / f"{checkpoint.name_of(step)}.png") as new:
                drawn.save(new, "PNG")

    def evaluates(self, step: int, total_steps: int, num_samples: int) -> bool:
        every = self.recipe.evals.knn_every
        return every is not None and step % every == 0

    def evaluate(self, step: int, alive: Callable[[], None]) -> dict:
        # A curve to watch: an image that training replaces is no reason to stop for it.
        try:
            return self._knn(alive)
        except AgreedError as error:
            if str(error) != self._said:
                say(f"evals.knn_every: not measured at step {step}, and the run goes on: {error}")
            self._said = str(error)
            return {}
