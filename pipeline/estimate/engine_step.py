"""Training steps of the real engine on random images, without data, for measurements."""

import gc

import torch

from pipeline.data.timing import time_steps
from pipeline.distributed.launch import DistInfo
from pipeline.methods import build_method
from pipeline.recipe import Recipe
from pipeline.train import engine
from pipeline.train.engine_config import engine_config
from pipeline.train.guard import Guard

NUM_WARMUP = 3
"""Steps before a measurement."""


class EngineStep:
    """A recipe's method in DeepSpeed's engine, with the guard: what the trainer does in a step of one micro batch.

    `engine.init_distributed` has connected the ranks. The global batch must be one micro batch on every rank.
    """

    def __init__(self, recipe: Recipe, dist_info: DistInfo):
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, dist_info.device
        self.method = build_method(recipe)
        config = engine_config(recipe, dist_info.world_size)
        self.engine = engine.build_engine(recipe, self.method, config, dist_info.device)
        self.guard = Guard(recipe.guard, recipe.engine.precision, dist_info.device)
        self._generator = torch.Generator(self.device).manual_seed(recipe.seed + dist_info.rank)
        self._step = 0

    def __call__(self, batch: int, images: torch.Tensor | None = None) -> torch.Tensor:
        """Train one step on `batch` random images, or on the given ones. Returns the loss, on the device."""
        self._step += 1
        if images is None:
            size = self.recipe.data.image_size
            images = torch.randn(batch, 3, size, size, device=self.device, generator=self._generator)
        noise = torch.rand(batch, self.method.noise_size, device=self.device, generator=self._generator)
        engine.set_learning_rate(self.engine, 1e-5)
        loss = self.engine(images, noise).loss
        self.engine.backward(loss)
        self.guard.observe_loss(loss)
        self.guard.record_step(self._step, engine.step(self.engine, self.guard.should_skip))
        self.guard.check(self._step - 1)
        return loss.detach()

    def measure(self, batch: int, steps: int) -> float:
        """Return the seconds per step, the mean of `steps` steps."""
        timing = time_steps(lambda: self(batch), self.device, warmup=NUM_WARMUP, min_steps=steps)
        return timing.seconds / timing.steps

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Free the memory, for another engine in this process."""
        self.engine.destroy()
        del self.engine, self.method, self.guard
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
