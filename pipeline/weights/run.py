"""A trained method, out of a run directory.

Invariant: the weights are those of the newest checkpoint in which they are whole, whatever ZeRO stage,
precision and number of ranks it was trained with: the fp32 masters.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.methods import build_method
from pipeline.methods.method import Method
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.base import TrainingRecipe
from pipeline.recipe.loading import read_yaml
from pipeline.recipe.sections import resize_of
from pipeline.train import checkpoint, engine
from pipeline.weights.state_dicts import timm_state_dict
from pipeline.weights.vit import Vit


class LoadedRun(NamedTuple):
    recipe: Recipe
    method: Method
    """On the CPU, in fp32, in eval mode."""
    step: int

    @property
    def vit(self) -> Vit:
        """Its encoder. UserError where that has relative positions."""
        recipe = self.recipe
        return Vit(
            origin=recipe.method.name,
            size=recipe.model.size,
            patch_size=recipe.model.patch_size,
            data=recipe.data,
            resize=resize_of(recipe.data.image_size),
            weights=timm_state_dict(self.method),
            ours=self.method.tokens,
        )


def load_run(run: Path, ema: bool = False) -> LoadedRun:
    """Read a run's recipe and newest checkpoint. ema: the weights' moving average instead of the weights.

    UserError where there is no pre-training run, nothing saved yet, or no average kept.
    """
    if is_classifier(run):
        raise UserError(
            f"{run}: is a fine-tuned classifier, and an encoder is wanted here; give what it was fine-tuned "
            "from, `weights` in its recipe.yaml"
        )
    recipe = load_recipe(run / "recipe.yaml")
    weights, step = newest_weights(run, recipe, ema)
    method = build_method(recipe)
    method.load_state_dict(weights)
    return LoadedRun(recipe, method.eval(), step)


def is_classifier(run: Path) -> bool:
    """Whether `finetune` made it. UserError where there is no run."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: no run directory (no recipe.yaml in it)")
    return "classifier" in read_yaml(run / "recipe.yaml")


def newest_weights(run: Path, recipe: TrainingRecipe, ema: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Of the newest checkpoint, under the learner's names, and its step. UserError as `load_run`."""
    if ema and recipe.train.ema_decay is None:
        raise UserError(f"{run}: keeps no moving average of the weights (train.ema_decay is null)")
    weights = engine.WEIGHTS_EMA if ema else engine.WEIGHTS
    newest = checkpoint.latest_checkpoint_with(run / "checkpoints", weights)
    if newest is None:
        raise UserError(f"{run}: has no checkpoint yet; one is written every train.checkpoint_every steps")
    return load_file(newest / weights), checkpoint.read_state(newest)["step"]
