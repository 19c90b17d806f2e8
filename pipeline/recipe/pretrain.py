"""The recipe of pre-training.

Invariant: a `Recipe` that was loaded can be trained. An unknown key, a wrong type or an impossible
combination is a `UserError` that names the file and the key; nothing is guessed or ignored.

Every method has its own section under `method`, so `--set method.name=mae` is enough to change the method.
Only the section of the named method is used, and that of efficient_mae by methods with `difficulty_flatten`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipeline.recipe.loading import load
from pipeline.recipe.method_options import SCHEDULE_START_BETA, MethodSection
from pipeline.recipe.sections import EvalsSection, ModelSection
from pipeline.recipe.training import TrainingRecipe


class Recipe(TrainingRecipe):
    """Everything that determines a pre-training run; read by `load_recipe`."""

    COMMAND: ClassVar[str] = "pretrain"
    FOREIGN_SECTIONS: ClassVar[dict[str, str]] = {"task": "finetune", "classifier": "finetune", "probe": "linprobe"}

    method: MethodSection
    model: ModelSection
    evals: EvalsSection = EvalsSection()

    if TYPE_CHECKING:  # frozen models are hashable, which type checkers do not know

        def __hash__(self) -> int: ...

    def _validate(self) -> None:
        super()._validate()
        size, patch, num_parts = self.data.image_size, self.model.patch_size, self.method.emae.num_parts
        if size % patch:
            raise ValueError(f"data.image_size: {size} is not a multiple of model.patch_size, {patch}")
        if self.method.name == "emae" and self.num_patches % num_parts:
            raise ValueError(
                f"method.emae.num_parts: {num_parts} does not divide the {self.num_patches} patches of a "
                f"{size} px image (patch {patch})"
            )
        self._validate_target()
        self._validate_mask()

    def _validate_target(self) -> None:
        name, target, patch = self.method.name, self.method.target.name, self.model.patch_size
        if "pixels" not in target and name not in ("mae", "lomar", "beit"):
            raise ValueError(f"method.target.name: {target} is supported by mae, lomar and beit, not by {name}")
        if target == "pca" and self.method.target.components > 3 * patch**2:
            raise ValueError(f"method.target.components: a patch has only {3 * patch**2} values")
        if target == "hog" and patch % 8:
            raise ValueError(f"method.target.name: hog needs a model.patch_size that is a multiple of 8, not {patch}")

    def _validate_mask(self) -> None:
        name, method = self.method.name, self.method
        efficient, lomar = method.efficient_mae, method.lomar
        if name == "mae":
            self._validate_mae()
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
        flattens = name in ("emae", "lomar") and getattr(method, name).difficulty_flatten
        if flattens and efficient.scheduler != "flatten":
            raise ValueError(
                f"method.efficient_mae.scheduler: {efficient.scheduler} is supported by efficient_mae only"
            )
        if name == "efficient_mae" or (flattens and name == "emae"):
            self._validate_threshold()

    def _validate_mae(self) -> None:
        mae = self.method.mae
        if mae.mask_sampling == "grid" and (mae.mask_ratio != 0.75 or self.grid % 2):
            raise ValueError(
                f"method.mae.mask_sampling: grid requires method.mae.mask_ratio 0.75, not {mae.mask_ratio:g}, and an "
                f"even number of patches along a side, not {self.grid}"
            )

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
                raise ValueError("method.efficient_mae.beta: the scheduler threshold needs a number")
            return
        if not in_pixels:
            raise ValueError(
                f"method.efficient_mae.beta: a distance in pixels, which {efficient.metric} is not; set it to null"
            )
        # A patch next to a visible one is (P + 1) / 2 pixels away on average; the schedule starts above that.
        smallest = (patch + 1) / 2 if efficient.scheduler != "schedule" else SCHEDULE_START_BETA * patch
        if beta < smallest:
            raise ValueError(
                f"method.efficient_mae.beta: {beta:g} px excludes almost every patch of {patch} px from the "
                f"loss; it must be at least {smallest:g}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return self.data.image_size // self.model.patch_size

    @property
    def num_patches(self) -> int:
        """L, the patches of an image."""
        return self.grid**2

    @property
    def num_visible(self) -> int:
        """Visible patches per image (EMAE: per part; LoMaR: per window), rounded as in MAE's code."""
        method = self.method
        if method.name == "emae":
            return self.num_patches // method.emae.num_parts
        if method.name == "lomar":
            patches = method.lomar.window_size**2
            return patches - int(patches * method.lomar.mask_ratio)
        ratio = getattr(method, method.name).mask_ratio
        if method.name == "beit":  # the number of masked patches is rounded down
            return self.num_patches - int(self.num_patches * ratio + 1e-9)
        return int(self.num_patches * (1 - ratio))

    @property
    def num_predicted(self) -> int:
        """Decoder slots per image, for Efficient MAE and for EMAE with difficulty_flatten."""
        masked, ratio = self.num_patches - self.num_visible, self.method.efficient_mae.prediction_ratio
        if ratio is None:
            return masked
        slots = int(self.mean_kept_patches) if ratio == "auto" else round(ratio * self.num_patches)
        return max(1, min(masked, slots))

    @property
    def mean_kept_patches(self) -> float:
        """Masked patches per image that Efficient MAE's decoder masking keeps, on average over random masks."""
        from pipeline.recipe import mask_statistics  # imports torch, which takes seconds

        options = self.method.efficient_mae
        difficulties = mask_statistics.sample_difficulties(
            self.grid,
            self.num_visible,
            self.model.patch_size,
            options.metric,
            options.exact_distance,
            options.num_nearest,
        )
        return mask_statistics.mean_kept_patches(difficulties, options.beta)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a pre-training recipe and apply overrides.

    Args:
        name_or_path: A YAML file, or the name of a recipe that ships with the package.
        overrides: "a.b=c" strings, as given by --set; c is parsed as YAML. Setting `train.steps` removes the
            file's `train.epochs` and vice versa, likewise `optim.warmup_steps` and `optim.warmup_epochs`.

    Raises:
        UserError: If the file or an override is invalid, with the file, the key and the reason in one line.
    """
    return load(Recipe, name_or_path, overrides)
