"""Load the classifier of a fine-tuning's run directory; `pipeline.weights.run` does so for pre-training."""

from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.recipe.classification import ClassificationRecipe
from pipeline.recipe.sections import VitSize
from pipeline.tasks.classifier import Classifier
from pipeline.tasks.run_metadata import InitialWeights, load_initial_weights
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.encoder import build_vit
from pipeline.weights.run import read_run
from pipeline.weights.state_dicts import require_absolute_positions
from pipeline.weights.vit import Vit

PREFIX = "vit."
"""Of a classifier's parameter names; timm's names follow."""


class LoadedClassifier(NamedTuple):
    """A fine-tuned classifier, in fp32 on the CPU, in eval mode."""

    recipe: ClassificationRecipe
    classifier: Classifier
    step: int
    initial: InitialWeights

    @property
    def vit(self) -> Vit:
        """Return the classifier in timm's terms. Raises UserError if it has LoMaR's relative positions."""
        vit = self.classifier.vit
        weights = vit.state_dict()
        require_absolute_positions(weights)
        return Vit(
            origin=self.recipe.COMMAND,
            size=VitSize(vit.embed_dim, len(vit.blocks), self.initial.heads),
            patch_size=vit.patch_embed.patch_size[0],
            data=self.recipe.data,
            resize=self.recipe.eval_resize,
            weights=weights,
            forward=self.classifier.predict_logits,
            classes=self.initial.classes,
            descriptions=self.initial.class_names,
        )


def load_classifier(run: Path, ema: bool = False) -> LoadedClassifier:
    """Load the classifier of a fine-tuning, with the weights of its newest checkpoint.

    Args:
        run: Run directory.
        ema: Load the moving average of the weights instead.

    Raises:
        UserError: If there is no checkpoint yet, no moving average, or RUN/weights.json does not match.
    """
    initial = load_initial_weights(RunDirectory(run))
    recipe, weights, step = read_run(run, ClassificationRecipe, ema)
    num_classes, width = weights[f"{PREFIX}head.weight"].shape
    if len(initial.classes) != num_classes or width % initial.heads:
        raise UserError(
            f"{RunDirectory(run).initial_weights}: {len(initial.classes)} classes and {initial.heads} heads "
            f"do not match the checkpoint ({num_classes} classes, width {width}); restore the file"
        )
    state = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    classifier = Classifier(build_vit(state, initial.heads, recipe.data.image_size), num_classes, recipe)
    classifier.load_state_dict(weights)
    return LoadedClassifier(recipe, classifier.eval(), step, initial)
