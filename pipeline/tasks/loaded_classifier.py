"""A fine-tuned classifier, out of a run directory; as `pipeline.weights.run` for pre-training."""

from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.errors import UserError
from pipeline.recipe.finetune import FinetuneRecipe
from pipeline.recipe.loading import load
from pipeline.recipe.sections import Size
from pipeline.tasks.classifier import Classifier
from pipeline.tasks.run_metadata import WEIGHTS_JSON, InitialWeights, load_initial_weights
from pipeline.weights.encoder import vit_for
from pipeline.weights.run import newest_weights
from pipeline.weights.state_dicts import check_positions
from pipeline.weights.vit import Vit

ROOT = "vit."
"""Of the names of a classifier's weights; what follows are timm's."""


class FinetunedRun(NamedTuple):
    recipe: FinetuneRecipe
    classifier: Classifier
    """On the CPU, in fp32, in eval mode."""
    step: int
    begun: InitialWeights

    @property
    def vit(self) -> Vit:
        """UserError where it has relative positions."""
        vit, begun = self.classifier.vit, self.begun
        weights = vit.state_dict()
        check_positions(weights)
        return Vit(
            origin=self.recipe.COMMAND,
            size=Size(vit.embed_dim, len(vit.blocks), begun.heads),
            patch_size=vit.patch_embed.patch_size[0],
            data=self.recipe.data,
            resize=self.recipe.resize,
            weights=weights,
            ours=self.classifier.scores,
            classes=begun.classes,
            descriptions=begun.class_names,
        )


def load_finetuned_run(run: Path, ema: bool = False) -> FinetunedRun:
    """Read a fine-tuning's recipe and newest checkpoint. ema: the weights' moving average instead of the
    weights.

    UserError where nothing is saved yet, no average is kept, or RUN/weights.json is not of these weights.
    """
    recipe, begun = load(FinetuneRecipe, run / "recipe.yaml"), load_initial_weights(run)
    weights, step = newest_weights(run, recipe, ema)
    _check_begun(run, begun, weights)
    timms = {name.removeprefix(ROOT): tensor for name, tensor in weights.items()}
    vit = vit_for(timms, begun.heads, recipe.data.image_size)
    classifier = Classifier(vit, len(begun.classes), recipe)
    classifier.load_state_dict(weights)
    return FinetunedRun(recipe, classifier.eval(), step, begun)


def _check_begun(run: Path, begun: InitialWeights, weights: dict[str, torch.Tensor]) -> None:
    classes, width = weights[f"{ROOT}head.weight"].shape
    if len(begun.classes) != classes or width % begun.heads:
        raise UserError(
            f"{run / WEIGHTS_JSON}: {len(begun.classes)} classes and {begun.heads} heads are not the checkpoint's, "
            f"which has {classes} classes and is {width} wide; mend it"
        )
