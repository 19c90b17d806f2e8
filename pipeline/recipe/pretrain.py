"""The recipe of pre-training: everything that decides what is trained, in one typed, checked YAML file.

Invariant: a `Recipe` that exists is possible. A misspelt key, a wrong type or a combination that cannot work
is one `UserError` that names the file and the key's path; nothing is guessed and nothing is ignored.

Each method has its own section under `method`, so `--set method.name=mae` is all it takes to change the
method; only the section that `method.name` names is used, and that of efficient_mae by the methods that
borrow its loss.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import model_validator

from pipeline.recipe.base import TrainingRecipe
from pipeline.recipe.loading import load
from pipeline.recipe.method_options import EASIEST_BETA, MethodSection
from pipeline.recipe.sections import EvalsSection, ModelSection


class Recipe(TrainingRecipe):
    """What is pre-trained, on what, and how. `load_recipe` makes one."""

    COMMAND = "pretrain"
    FOREIGN_SECTIONS = {"classifier": "finetune", "probe": "linprobe"}  # noqa: RUF012 (not a field)

    method: MethodSection
    model: ModelSection
    evals: EvalsSection = EvalsSection()

    @model_validator(mode="after")
    def _validate(self) -> "Recipe":
        size, patch = self.data.image_size, self.model.patch_size
        if size % patch:
            raise ValueError(f"data.image_size: {size} is not a multiple of model.patch_size, {patch}")
        if self.method.name == "emae" and self.num_patches % self.method.emae.num_parts:
            raise ValueError(
                f"method.emae.num_parts: {self.method.emae.num_parts} does not divide the {self.num_patches} "
                f"patches of a {size} px image (patch {patch})"
            )
        self._validate_mask()
        return self

    def _validate_mask(self) -> None:
        name, method = self.method.name, self.method
        efficient, lomar = method.efficient_mae, method.lomar
        if name == "lomar" and lomar.window_size > self.grid:
            raise ValueError(
                f"method.lomar.window_size: {lomar.window_size} patches do not fit into an image of "
                f"{self.grid} x {self.grid}"
            )
        if name != "emae":
            maskable = lomar.window_size**2 if name == "lomar" else self.num_patches
            if not 1 <= self.num_visible < maskable:
                raise ValueError(
                    f"method.{name}.mask_ratio: {getattr(method, name).mask_ratio} leaves {self.num_visible} "
                    f"of {maskable} patches visible; at least one must be visible and one masked"
                )
        borrowed = (name == "emae" and method.emae.difficulty_flatten) or (
            name == "lomar" and lomar.difficulty_flatten
        )
        if borrowed and efficient.scheduler != "flatten":
            raise ValueError(
                f"method.efficient_mae.scheduler: {efficient.scheduler} goes with efficient_mae alone"
            )
        if name == "efficient_mae" or (borrowed and name == "emae"):
            self._validate_threshold()

    def _validate_threshold(self) -> None:
        efficient, patch = self.method.efficient_mae, self.model.patch_size
        beta, in_pixels = efficient.beta, efficient.metric in ("p2dist", "nearest_patch")
        if efficient.scheduler in ("schedule", "normalize") and not in_pixels:
            raise ValueError(
                f"method.efficient_mae.scheduler: {efficient.scheduler} needs a distance in pixels, which "
                f"{efficient.metric} is not"
            )
        if beta is None:
            if efficient.scheduler == "threshold":
                raise ValueError("method.efficient_mae.beta: the scheduler threshold needs one")
            return
        if not in_pixels:
            raise ValueError(
                f"method.efficient_mae.beta: a distance in pixels, which {efficient.metric} is not; "
                f"set it to null"
            )
        # A patch beside a visible one is (P + 1) / 2 pixels away on average; the schedule starts above that.
        least = (patch + 1) / 2 if efficient.scheduler != "schedule" else EASIEST_BETA * patch
        if beta < least:
            raise ValueError(
                f"method.efficient_mae.beta: {beta:g} px would leave next to no patch of {patch} px to learn "
                f"from; it must be at least {least:g}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return self.data.image_size // self.model.patch_size

    @property
    def num_patches(self) -> int:
        """L: patches an image is cut into."""
        return self.grid**2

    @property
    def num_visible(self) -> int:
        """Patches that the encoder sees at once, of an image or (LoMaR) a window, rounded as MAE's code."""
        if self.method.name == "emae":
            return self.num_patches // self.method.emae.num_parts
        if self.method.name == "lomar":
            patches = self.method.lomar.window_size**2
            return patches - int(patches * self.method.lomar.mask_ratio)
        ratio = {"mae": self.method.mae, "efficient_mae": self.method.efficient_mae}[
            self.method.name
        ].mask_ratio
        return int(self.num_patches * (1 - ratio))

    @property
    def num_predicted(self) -> int:
        """Efficient MAE, and EMAE with its loss: slots of the decoder."""
        masked, share = self.num_patches - self.num_visible, self.method.efficient_mae.prediction_ratio
        return masked if share is None else max(1, min(masked, round(share * self.num_patches)))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    `name_or_path`: a YAML file, or the name of a recipe that ships with the package.
    `overrides`: "a.b=c" strings; c is read as YAML. Setting `train.steps` drops the file's `train.epochs` and
    the other way round, and likewise `optim.warmup_steps` and `optim.warmup_epochs`.
    Raises UserError, one line: the file, the key's path, what is wrong.
    """
    return load(Recipe, name_or_path, overrides)
