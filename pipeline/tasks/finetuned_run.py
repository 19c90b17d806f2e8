"""A fine-tuned classifier, out of a run directory; as `pipeline.trained` for pre-training."""

from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.errors import UserError
from pipeline.evals.encoder import vit_for
from pipeline.export.state_dicts import check_positions
from pipeline.export.vit import Vit
from pipeline.finetune.begun import BEGUN, Begun, read_begun
from pipeline.finetune.classifier import Classifier
from pipeline.finetune.recipe import FinetuneRecipe
from pipeline.models.sizes import Size
from pipeline.recipe_file import load
from pipeline.trained import newest_weights

ROOT = "vit."
"""Of the names of a classifier's weights; what follows are timm's."""


class TrainedClassifier(NamedTuple):
    recipe: FinetuneRecipe
    classifier: Classifier
    """On the CPU, in fp32, in eval mode."""
    step: int
    begun: Begun

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


def load_classifier(run: Path, ema: bool = False) -> TrainedClassifier:
    """Read a fine-tuning's recipe and newest checkpoint. ema: the weights' moving average instead of the
    weights.

    UserError where nothing is saved yet, no average is kept, or RUN/weights.json is not of these weights.
    """
    recipe, begun = load(FinetuneRecipe, run / "recipe.yaml"), read_begun(run)
    weights, step = newest_weights(run, recipe, ema)
    _check_begun(run, begun, weights)
    timms = {name.removeprefix(ROOT): tensor for name, tensor in weights.items()}
    vit = vit_for(timms, begun.heads, recipe.data.image_size)
    classifier = Classifier(vit, len(begun.classes), recipe)
    classifier.load_state_dict(weights)
    return TrainedClassifier(recipe, classifier.eval(), step, begun)


def _check_begun(run: Path, begun: Begun, weights: dict[str, torch.Tensor]) -> None:
    classes, width = weights[f"{ROOT}head.weight"].shape
    if len(begun.classes) != classes or width % begun.heads:
        raise UserError(
            f"{run / BEGUN}: {len(begun.classes)} classes and {begun.heads} heads are not the checkpoint's, "
            f"which has {classes} classes and is {width} wide; mend it"
        )
