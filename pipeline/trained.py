"""A trained method, out of a run directory.

Invariant: the weights are those of the newest checkpoint in which they are whole, whatever ZeRO stage,
precision and number of ranks it was trained with: the fp32 masters.
"""

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.methods import build_method
from pipeline.methods.method import Method
from pipeline.recipe import Recipe, load_recipe
from pipeline.train import checkpoint, engine


class Trained(NamedTuple):
    recipe: Recipe
    method: Method
    """On the CPU, in fp32, in eval mode."""
    step: int


def load_run(run: Path, ema: bool = False) -> Trained:
    """Read a run's recipe and newest checkpoint. ema: the weights' moving average instead of the weights.

    UserError where there is no run, nothing saved yet, or no average kept.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: no run directory (no recipe.yaml in it)")
    recipe = load_recipe(run / "recipe.yaml")
    if ema and recipe.train.ema_decay is None:
        raise UserError(f"{run}: keeps no moving average of the weights (train.ema_decay is null)")
    weights = engine.WEIGHTS_EMA if ema else engine.WEIGHTS
    newest = checkpoint.newest_whole(run / "checkpoints", only=weights)
    if newest is None:
        raise UserError(f"{run}: has no checkpoint yet; one is written every train.checkpoint_every steps")
    state = checkpoint.read_state(newest)
    method = build_method(recipe)
    method.load_state_dict(load_file(newest / weights))
    return Trained(recipe, method.eval(), state["step"])
