"""Load the recipe and weights of a run directory.

Invariant: the weights are the fp32 master weights of the newest undamaged checkpoint, whatever ZeRO stage,
precision and world size the run used.
"""

from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.methods import build_method
from pipeline.methods.method import Method
from pipeline.recipe import Recipe
from pipeline.recipe.loading import load, read_yaml
from pipeline.recipe.sections import eval_resize_size
from pipeline.recipe.training import TrainingRecipe
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.finite import check_finite
from pipeline.weights.state_dicts import timm_state_dict
from pipeline.weights.vit import Vit

AnyRecipe = TypeVar("AnyRecipe", bound=TrainingRecipe)
FINETUNED_REJECTED = "is a fine-tuned model, not an encoder; pass the weights it was fine-tuned from"


class LoadedRun(NamedTuple):
    """A pre-trained method, in fp32 on the CPU, in eval mode."""

    recipe: Recipe
    method: Method
    step: int

    @property
    def vit(self) -> Vit:
        """Return the encoder in timm's terms. Raises UserError if it has LoMaR's relative positions."""
        recipe = self.recipe
        return Vit(
            origin=recipe.method.name,
            size=recipe.model.size,
            patch_size=recipe.model.patch_size,
            data=recipe.data,
            resize=eval_resize_size(recipe.data.image_size),
            weights=timm_state_dict(self.method),
            forward=self.method.forward_features,
        )


def load_run(run: Path, ema: bool = False) -> LoadedRun:
    """Load the method of a pre-training run, with the weights of its newest checkpoint.

    Args:
        run: Run directory.
        ema: Load the moving average of the weights instead.

    Raises:
        UserError: If there is no pre-training run, it has no checkpoint yet, or it keeps no moving average.
    """
    if run_command(run) == "finetune":
        raise UserError(f"{run}: {FINETUNED_REJECTED}, `weights` in its recipe.yaml")
    recipe, weights, step = read_run(run, Recipe, ema)
    method = build_method(recipe)
    method.load_state_dict(weights)
    return LoadedRun(recipe, method.eval(), step)


def run_command(run: Path) -> str:
    """Return the command that made a run directory: pretrain, finetune or linprobe.

    Raises:
        UserError: If it is not a run directory.
    """
    recipe = RunDirectory(run).recipe_file
    if not recipe.is_file():
        raise UserError(f"{run}: not a run directory (it has no {recipe.name})")
    tree = read_yaml(recipe)
    return "pretrain" if "method" in tree else "linprobe" if "probe" in tree else "finetune"


def read_run(run: Path, kind: type[AnyRecipe], ema: bool) -> tuple[AnyRecipe, dict[str, torch.Tensor], int]:
    """Read a run's recipe, its newest weights by parameter name, and their step.

    Raises:
        UserError: If the recipe is not of this kind, there is no checkpoint or no moving average, or a weight is not
            finite.
    """
    from pipeline.train import checkpoint, engine  # imports DeepSpeed, which takes seconds

    directory = RunDirectory(run)
    recipe = load(kind, directory.recipe_file)
    if ema and recipe.train.ema_decay is None:
        raise UserError(f"{run}: keeps no moving average of the weights (train.ema_decay is null)")
    weights = engine.WEIGHTS_EMA if ema else engine.WEIGHTS
    newest = checkpoint.latest_checkpoint_with(directory.checkpoints, weights)
    if newest is None:
        raise UserError(f"{run}: has no checkpoint yet; train until the first one (train.checkpoint_every steps)")
    tensors = load_file(newest / weights)
    check_finite(tensors, newest / weights)
    return recipe, tensors, checkpoint.read_state(newest)["step"]
