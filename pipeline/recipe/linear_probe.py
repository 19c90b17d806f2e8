"""The recipe of a linear probe; PROTOCOL is MAE's for ViT-B (He et al. 2022, Table 10).

Invariant: as of every recipe, nothing in it is ignored.
"""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from pipeline.errors import UserError
from pipeline.recipe.loading import RecipeFile, parse_overrides, validate
from pipeline.recipe.sections import DataSection, Section, TrainSection

PROTOCOL = {
    "data": {"global_batch": 16384, "crop_scale": [0.08, 1.0], "holdout": 0.01, "max_undecodable": 0},
    "train": {"epochs": 90, "log_every": 20, "checkpoint_every": 500},
}


OF_THE_WEIGHTS = {
    "data.image_size": "give --image-size",
    "data.mean": "leave it out",
    "data.std": "leave it out",
    "probe.digest": "leave it out",
}
OF_RANDOM_CROPS = ("data.crop_scale", "data.crop_ratio", "data.flip")


class ProbeSection(Section):
    weights: str
    """What is judged, as pipeline/evals/feature_extractor.py understands it."""
    digest: str | None = None
    """Of the weights; filled in."""
    pool: Literal["class_token", "mean"] = "class_token"
    base_lrs: tuple[float, ...] = Field((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), min_length=1)
    """A head is trained with each: its rate is base_lr x global_batch / 256. MAE's is 0.1."""
    warmup_epochs: float = Field(10.0, ge=0.0)
    center_crops: bool = False
    """Train on the features of centre crops, extracted once, instead of random resized crops."""
    resize: int | None = Field(None, ge=1)
    """Pixels of the shorter side before the centre is cut out; null: as MAE, `resize_of`."""

    @model_validator(mode="after")
    def _validate(self) -> "ProbeSection":
        if min(self.base_lrs) <= 0 or len(set(self.base_lrs)) < len(self.base_lrs):
            raise ValueError(f"probe.base_lrs: {list(self.base_lrs)} must be positive and different")
        return self


class ProbeEngineSection(Section):
    """How the encoder is run. The heads are small: every rank has them whole, in fp32."""

    zero_stage: Literal[0] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    micro_batch: int = Field(128, ge=1)
    """Images that a rank takes through the encoder at once."""
    timeout_minutes: float = Field(10.0, gt=0.0)


class ProbeRecipe(RecipeFile):
    """`load_probe_recipe` makes one."""

    seed: int = Field(0, ge=0, lt=2**63)
    probe: ProbeSection
    data: DataSection
    engine: ProbeEngineSection = ProbeEngineSection()
    train: TrainSection

    @model_validator(mode="after")
    def _validate(self) -> "ProbeRecipe":
        if len(self.probe.base_lrs) > 1 and not self.data.holdout:
            raise ValueError(
                "data.holdout: is 0, so there is nothing by which to choose from several probe.base_lrs; "
                "give a share of the training set, or one learning rate"
            )
        if self.data.global_batch < 2:
            raise ValueError("data.global_batch: features are normalised over the batch, so 2 at least")
        for key, given in {
            "data.sources": self.data.sources,
            "data.trace": self.data.trace,
            "data.max_undecodable": self.data.max_undecodable,
            "data.crops_per_image": self.data.crops_per_image > 1,
            "train.profile_steps": self.train.profile_steps,
            "train.ema_decay": self.train.ema_decay,
        }.items():
            if given:
                raise ValueError(f"{key}: is not for a probe")
        return self

    def total_steps(self, samples: int) -> int:
        return self.train.steps or math.ceil(self.train.epochs * samples / self.data.global_batch)

    def accumulation(self, world_size: int) -> int:
        """Micro batches that a rank takes for a step. UserError where there is a remainder."""
        at_once = 1 if self.probe.center_crops else self.engine.micro_batch
        count, rest = divmod(self.data.global_batch, at_once * world_size)
        if rest or not count:
            raise UserError(
                f"data.global_batch: {self.data.global_batch} is no multiple of engine.micro_batch x ranks = "
                f"{at_once} x {world_size}; change one of the three"
            )
        return 1 if self.probe.center_crops else count


def load_probe_recipe(given: dict[str, dict], overrides: Sequence[str] = ()) -> ProbeRecipe:
    """PROTOCOL with the keys that are `given`, by section, and "a.b=c" overrides. UserError, one line."""
    sections = PROTOCOL.keys() | given.keys()
    tree = {name: {**PROTOCOL.get(name, {}), **given.get(name, {})} for name in sections}
    recipe = validate(ProbeRecipe, tree, "linprobe", overrides)
    for key in sorted(parse_overrides(overrides)):
        if key in OF_THE_WEIGHTS:
            raise UserError(f"--set {key}: follows from --weights; {OF_THE_WEIGHTS[key]}")
        if key in {f"probe.{name}" for name in given.get("probe", {})}:
            raise UserError(f"--set {key}: has an option of its own; give that")
        if key in {f"data.{name}" for name in given.get("data", {})}:
            raise UserError(f"--set {key}: follows from --labels; leave one of the two out")
        if key in OF_RANDOM_CROPS and recipe.probe.center_crops:
            raise UserError(f"--set {key}: is not for --center-crops; leave one of the two out")
    return recipe
