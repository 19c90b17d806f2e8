"""The recipe of a linear probe. The defaults are MAE's for ViT-B (He et al. 2022, Table 10).

Invariant: a key that a linear probe does not use is an error.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipeline.errors import UserError
from pipeline.recipe.loading import RecipeFile, parse_overrides, validate
from pipeline.recipe.sections import DataSection, Section, TrainSection
from pipeline.recipe.training import count_micro_batches

DEFAULTS = {
    "data": {"global_batch": 16384, "crop_scale": [0.08, 1.0], "holdout": 0.01, "max_undecodable": 0},
    "train": {"epochs": 90, "log_every": 20, "checkpoint_every": 500},
}
"""Defaults of a linear probe that differ from those of the sections."""
SET_BY_WEIGHTS = {
    "data.image_size": "give --image-size",
    "data.mean": "remove it",
    "data.std": "remove it",
    "probe.digest": "remove it",
}
"""Keys that --set may not change, and what to do instead."""
RANDOM_CROP_KEYS = ("data.crop_scale", "data.crop_ratio", "data.flip")


class ProbeSection(Section):
    """The encoder and the linear heads."""

    weights: str
    """Encoder to evaluate, as given by --weights."""
    digest: str | None = None
    """Digest of the encoder's weights; filled in when they are loaded."""
    pool: Literal["class_token", "mean"] = "class_token"
    """Feature of an image: the class token, or the mean of the patch tokens."""
    base_lrs: tuple[float, ...] = Field(default=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0), min_length=1)
    """Learning rates for a global batch of 256; one head is trained with each. MAE's is 0.1."""
    warmup_epochs: float = Field(default=10.0, ge=0.0)
    """Epochs of linear warm-up."""
    center_crops: bool = False
    """Train on features of center crops, extracted once, instead of random resized crops."""
    resize: int | None = Field(default=None, ge=1)
    """Shorter side in pixels before the center crop; null: MAE's, see `eval_resize_size`."""

    def _validate(self) -> None:
        if min(self.base_lrs) <= 0 or len(set(self.base_lrs)) < len(self.base_lrs):
            raise ValueError(f"probe.base_lrs: {list(self.base_lrs)} must be positive and different")


class ProbeEngineSection(Section):
    """How the frozen encoder is executed. The heads are replicated on every rank, in fp32."""

    zero_stage: Literal[0] = 0
    """Always 0: the heads are not sharded."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder."""
    micro_batch: int = Field(default=128, ge=1)
    """Images per rank and forward pass of the encoder."""
    timeout_minutes: float = Field(default=10.0, gt=0.0)
    """Minutes without progress after which a rank exits."""


class ProbeRecipe(RecipeFile):
    """Everything that determines a linear probe; made by `load_probe_recipe`."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the heads, the sample order and the crops."""
    probe: ProbeSection
    data: DataSection
    engine: ProbeEngineSection = ProbeEngineSection()
    train: TrainSection

    def _validate(self) -> None:
        if len(self.probe.base_lrs) > 1 and not self.data.holdout:
            raise ValueError(
                "data.holdout: must be positive to choose among several probe.base_lrs; set it, or give one "
                "learning rate"
            )
        if self.data.global_batch < 2:
            raise ValueError("data.global_batch: must be at least 2, for batch normalization of the features")
        for key, value in {
            "data.sources": self.data.sources,
            "data.trace": self.data.trace,
            "data.augmentation": self.data.augmentation != "random_size",
            "data.max_undecodable": self.data.max_undecodable,
            "data.crops_per_image": self.data.crops_per_image > 1,
            "train.profile_steps": self.train.profile_steps,
            "train.ema_decay": self.train.ema_decay,
        }.items():
            if value:
                raise ValueError(f"{key}: is not supported by a linear probe; remove it")

    def total_steps(self, num_samples: int) -> int:
        """Return the probe's number of steps on `num_samples` samples."""
        return self.train.total_steps(num_samples, self.data.global_batch)

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Return the micro batches per rank and step; see `count_micro_batches`."""
        cached = self.probe.center_crops  # cached features need no forward pass of the encoder
        steps = count_micro_batches(self.data.global_batch, 1 if cached else self.engine.micro_batch, world_size)
        return 1 if cached else steps


def load_probe_recipe(options: dict[str, dict], overrides: Sequence[str] = ()) -> ProbeRecipe:
    """Make the recipe of a linear probe.

    Args:
        options: Keys that differ from the defaults, by section.
        overrides: "a.b=c" strings, as given by --set.

    Raises:
        UserError: If a key or a value is invalid, or an override sets a key that an option or --weights sets.
    """
    sections = DEFAULTS.keys() | options.keys()
    tree = {name: {**DEFAULTS.get(name, {}), **options.get(name, {})} for name in sections}
    recipe = validate(ProbeRecipe, tree, "linprobe", overrides)
    for key in sorted(parse_overrides(overrides)):
        section, _, name = key.partition(".")
        if key in SET_BY_WEIGHTS:
            raise UserError(f"--set {key}: is determined by --weights; {SET_BY_WEIGHTS[key]}")
        if section == "probe" and name in options.get("probe", {}):
            raise UserError(f"--set {key}: has its own option; use that")
        if section == "data" and name in options.get("data", {}):
            raise UserError(f"--set {key}: is set by --labels; remove one of the two")
        if key in RANDOM_CROP_KEYS and recipe.probe.center_crops:
            raise UserError(f"--set {key}: has no effect with --center-crops; remove one of the two")
    return recipe
