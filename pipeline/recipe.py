"""The recipe: everything that decides what is trained, in one typed, checked YAML file.

Invariant: a `Recipe` that exists is possible. A misspelt key, a wrong type or a combination that cannot work
is one `UserError` that names the file and the key's path; nothing is guessed and nothing is ignored.

Each method has its own section under `method`, so `--set method.name=mae` is all it takes to change the
method; only the section that `method.name` names is used, and that of efficient_mae by the methods that
borrow its loss.
"""

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.errors import UserError
from pipeline.method_options import MethodSection, Section
from pipeline.models.sizes import SIZES, Size

SMALLEST_SHARE = 1e-6  # of a source in a mix: a block of the mix draws every source
SHIPPED = Path(__file__).parent / "recipes"


class ModelSection(Section):
    name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    patch_size: int = Field(16, ge=1)
    width: int | None = Field(None, ge=1)
    """Width, depth and heads replace the named model's own; null keeps them."""
    depth: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    decoder_width: int = Field(512, ge=1)
    decoder_depth: int = Field(8, ge=1)
    decoder_heads: int = Field(16, ge=1)

    @property
    def size(self) -> Size:
        """Width, depth and heads of the encoder, replacements applied."""
        named = SIZES[self.name]
        return Size(self.width or named.width, self.depth or named.depth, self.heads or named.heads)


class Source(Section):
    """One shard set: a directory, or a URL that fsspec opens."""

    path: str = Field(min_length=1)
    weight: float | None = Field(None, gt=0.0)
    """Share of the stream, relative to the other sources' weights."""


class DataSection(Section):
    sources: tuple[Source, ...] | None = Field(None, min_length=1)
    """The shard sets, where --data does not name them. Without weights one stream reads them all, each sample
    once an epoch; with weights (all or none) samples are drawn in these proportions."""
    subset: float = Field(1.0, gt=0.0, le=1.0)
    """Train on this share of the samples, chosen by a hash of their keys."""
    holdout: float = Field(0.0, ge=0.0, lt=1.0)
    """Keep this share of the samples, chosen likewise, out of training, for validation."""
    image_size: int = Field(224, ge=1)
    global_batch: int = Field(4096, ge=1)
    """Images a step, over all ranks and accumulation steps."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random resized crop covers, from and to."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    window_shards: int = Field(16, ge=1)
    """Samples mix freely inside windows of so many shards: more mixes better, fewer reads more locally."""
    readers: int = Field(4, ge=1)
    """Threads a rank that read ahead."""
    read_ahead_mb: int = Field(256, ge=1)
    """Megabytes of images that a rank may hold between the storage and the decoder."""
    timeout_s: float = Field(30.0, gt=0.0)
    """A read without a sign of life for so long has failed, and is tried again."""
    retries: int = Field(5, ge=0)
    """Tries after the first before the run stops, with waits of 0.5, 1, 2, ... 30 s between them."""
    cache_dir: str | None = None
    """A directory on the node's own disk that keeps whole shards; for sets behind a slow network."""
    cache_gb: float | None = Field(None, gt=0.0)
    """Gigabytes (10^9) that cache_dir may hold; the shards used least recently go first."""
    threads: int | None = Field(None, ge=1)
    """Decoding threads a rank; null: the machine's cores shared evenly by its ranks."""
    prefetch: int | None = Field(None, ge=1)
    """Batches decoded ahead; null: 2, on a GPU 3."""
    crops_per_image: int = Field(1, ge=1, le=256)
    """Crops of each image that follow each other in the stream, for one decode (repeated augmentation, Hoffer
    et al. 2020). The global batch, steps and epochs count crops."""
    max_replaced: int = Field(100, ge=0)
    """Samples that a rank may find undecodable, and replace by their neighbours, before the run stops."""
    trace: bool = False
    """Write the samples of every step, and digests of their pixels, to samples/ in the run directory."""


class EngineSection(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    micro_batch: int = Field(64, ge=1)
    """Images a rank takes through the model at once. The accumulation steps follow from it."""
    activation_checkpointing: bool = False
    """Compute each transformer block's activations again in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the method's forward."""
    timeout_minutes: float = Field(10.0, gt=0.0)
    """A rank that makes no progress for so long ends itself, and with it the run."""


class OptimSection(Section):
    base_lr: float = Field(1.5e-4, gt=0.0)
    """Learning rate for a batch of 256; the rate in use is base_lr x global_batch / 256."""
    min_lr: float = Field(0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0.0)
    warmup_epochs: float | None = Field(None, ge=0.0)
    warmup_steps: int | None = Field(None, ge=0)
    clip_grad: float | None = Field(None, gt=0.0)


class GuardSection(Section):
    """When a step is skipped, and what follows: pipeline/train/guard.py."""

    window: int = Field(128, ge=8)
    """Losses of so many good steps say what a loss should be; until there are as many, no loss is a spike."""
    spike_z: float | None = Field(10.0, gt=0.0)
    """A loss so many robust standard deviations over their median is a spike; null: no loss is."""
    skips_in_a_row: int = Field(8, ge=1)
    """So many skipped steps in a row: the run goes back to an earlier checkpoint and on with other data."""
    returns: int = Field(3, ge=0)
    """So many returns without getting past the trouble: the run stops at the next."""


class TrainSection(Section):
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0.0)
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(3, ge=1)
    """So many of the newest checkpoints stay."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints of steps that are multiples of this stay for good; null: none does."""


class Recipe(Section):
    """What is trained, on what, and how. `load_recipe` makes one."""

    seed: int = Field(0, ge=0, lt=2**63)
    method: MethodSection
    model: ModelSection
    data: DataSection = DataSection()
    engine: EngineSection = EngineSection()
    optim: OptimSection = OptimSection()
    guard: GuardSection = GuardSection()
    train: TrainSection

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        size, patch = self.data.image_size, self.model.patch_size
        if size % patch:
            raise ValueError(f"data.image_size: {size} is not a multiple of model.patch_size, {patch}")
        for name, width, heads in (
            ("", self.model.size.width, self.model.size.heads),
            ("decoder_", self.model.decoder_width, self.model.decoder_heads),
        ):
            if width % 4 or width % heads:
                raise ValueError(
                    f"model.{name}width: {width} must be a multiple of model.{name}heads, {heads}, and of 4"
                    f" (2-D sine-cosine positions)"
                )
        if self.method.name == "emae" and self.num_patches % self.method.emae.num_parts:
            raise ValueError(
                f"method.emae.num_parts: {self.method.emae.num_parts} does not divide the {self.num_patches} "
                f"patches of a {size} px image (patch {patch})"
            )
        self._possible_mask()
        if (self.train.steps is None) == (self.train.epochs is None):
            raise ValueError("train.steps, train.epochs: give one of the two")
        if self.optim.warmup_steps is not None and self.optim.warmup_epochs is not None:
            raise ValueError("optim.warmup_steps, optim.warmup_epochs: give at most one of the two")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self.data, name)
            if not 0 < low <= high:
                raise ValueError(f"data.{name}: [{low}, {high}] is not a range of positive numbers")
        if self.data.crop_scale[1] > 1:
            raise ValueError(f"data.crop_scale: {self.data.crop_scale[1]} is more than the whole image")
        if self.engine.micro_batch % self.data.crops_per_image:
            raise ValueError(
                f"data.crops_per_image: {self.data.crops_per_image} does not divide engine.micro_batch, "
                f"{self.engine.micro_batch}"
            )
        self._possible_sources()
        if min(self.data.std) <= 0:
            raise ValueError("data.std: each of the three must be positive")
        if not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ValueError(f"optim.betas: {list(self.optim.betas)} must lie in [0, 1)")
        return self

    def _possible_sources(self) -> None:
        sources = self.data.sources or ()
        paths = [source.path for source in sources]
        weights = [source.weight for source in sources if source.weight is not None]
        if len(set(paths)) < len(paths):
            raise ValueError(f"data.sources: {max(paths, key=paths.count)} stands there twice")
        if weights and len(weights) < len(sources):
            raise ValueError("data.sources: give every source a weight, or none")
        if weights and min(weights) < SMALLEST_SHARE * sum(weights):
            raise ValueError(
                f"data.sources: {min(weights):g} is less than {SMALLEST_SHARE:g} of the sum of the weights"
            )
        if (self.data.cache_dir is None) != (self.data.cache_gb is None):
            raise ValueError("data.cache_dir, data.cache_gb: give both or neither")

    def _possible_mask(self) -> None:
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
        if name == "efficient_mae" or (name == "emae" and method.emae.difficulty_flatten):
            if efficient.beta is not None and efficient.metric in ("neighbors_3x3", "inverse_distance_5x5"):
                raise ValueError(
                    f"method.efficient_mae.beta: a distance in pixels, which {efficient.metric} is not; "
                    f"set it to null"
                )
            if efficient.scheduler != "flatten" and name == "emae":
                raise ValueError(
                    f"method.efficient_mae.scheduler: {efficient.scheduler} goes with efficient_mae alone"
                )
            if efficient.beta is None and efficient.scheduler in ("threshold", "schedule"):
                raise ValueError(
                    f"method.efficient_mae.beta: the scheduler {efficient.scheduler} needs a threshold"
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
        """Efficient MAE: slots of the decoder."""
        masked, share = self.num_patches - self.num_visible, self.method.efficient_mae.prediction_ratio
        return masked if share is None else max(1, min(masked, round(share * self.num_patches)))

    @property
    def lr(self) -> float:
        """Peak learning rate, by MAE's linear scaling rule."""
        return self.optim.base_lr * self.data.global_batch / 256

    def sources(self, given: Sequence[str]) -> tuple[Source, ...]:
        """The shard sets of a run: those that --data names, or the recipe's. UserError unless one does."""
        if given and self.data.sources:
            raise UserError(
                f"--data {given[0]}, data.sources: both name shard sets; leave one of the two out"
            )
        if not all(given):
            raise UserError("--data: is empty; give a shard set's directory or URL")
        if len(set(given)) < len(given):
            raise UserError(f"--data {max(given, key=given.count)}: stands there twice")
        sources = self.data.sources or tuple(Source(path=path) for path in given)
        if not sources:
            raise UserError("--data, data.sources: name a shard set by one of the two")
        return sources

    def total_steps(self, num_samples: int) -> int:
        """Steps of the whole run on a set of `num_samples`. An epoch need not be a whole number of steps."""
        if self.train.steps is not None:
            return self.train.steps
        return math.ceil(self.train.epochs * num_samples / self.data.global_batch)

    def warmup_steps(self, num_samples: int) -> float:
        """Steps over which the learning rate rises, on a set of `num_samples`."""
        if self.optim.warmup_epochs is not None:
            return self.optim.warmup_epochs * num_samples / self.data.global_batch
        return self.optim.warmup_steps or 0

    def accumulation(self, world_size: int) -> int:
        """Micro batches that a rank takes for a step. UserError where there is a remainder."""
        share = world_size * self.engine.micro_batch
        steps, rest = divmod(self.data.global_batch, share)
        if rest or not steps:
            raise UserError(
                f"data.global_batch: {self.data.global_batch} is no multiple of engine.micro_batch x ranks "
                f"= {self.engine.micro_batch} x {world_size} = {share}; change one of the three"
            )
        return steps

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Keys whose values differ, as "a.b.c": (value here, value there)."""
        mine, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}

    def to_yaml(self) -> str:
        """The whole recipe, defaults included; `load_recipe` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(name_or_path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    `name_or_path`: a YAML file, or the name of a recipe that ships with the package.
    `overrides`: "a.b=c" strings; c is read as YAML. Setting `train.steps` drops the file's `train.epochs` and
    the other way round, and likewise `optim.warmup_steps` and `optim.warmup_epochs`.
    Raises UserError, one line: the file, the key's path, what is wrong.
    """
    path = _find(name_or_path)
    try:
        tree = yaml.load(path.read_text(), Loader=_UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys; this file is not")
    where = str(path)
    if overrides:
        _override(tree, overrides)
        where += " with --set " + " ".join(overrides)
    try:
        # Python mode is strict about tuples and YAML has lists only, so validation goes through JSON's rules.
        return Recipe.model_validate_json(_as_json(tree))
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_complaint(e) for e in error.errors())) from None


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, with two of its traps closed: a key given twice, and `1e-4` read as a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key!r} stands twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file")
        return path
    shipped = SHIPPED / f"{name_or_path}.yaml"
    if not shipped.is_file():
        names = shipped_recipes()
        raise UserError(
            f"recipe {str(name_or_path)!r}: neither a file nor a shipped recipe"
            f"{_nearest(str(name_or_path), names)}; shipped are {', '.join(names)}"
        )
    return shipped


RIVALS = {  # of each pair at most one is given: an override of one takes the other out
    ("train", "steps"): ("train", "epochs"),
    ("train", "epochs"): ("train", "steps"),
    ("optim", "warmup_steps"): ("optim", "warmup_epochs"),
    ("optim", "warmup_epochs"): ("optim", "warmup_steps"),
}


def _override(tree: dict, overrides: tuple[str, ...] | list[str]) -> None:
    given = {tuple(override.partition("=")[0].strip().split(".")) for override in overrides}
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = tuple(key.strip().split("."))
        if not equals or not all(keys):
            raise UserError(f"--set {override}: expected KEY.KEY=VALUE, for example --set optim.base_lr=1e-4")
        try:
            value = yaml.load(text, Loader=_UniqueKeys)
        except yaml.YAMLError:
            raise UserError(f"--set {override}: the value is not YAML") from None
        section = tree
        for name in keys[:-1]:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UserError(f"--set {override}: {name!r} is a value in this recipe, not a section")
        section[keys[-1]] = value
        rival = RIVALS.get(keys)
        if rival and rival not in given and isinstance(tree.get(rival[0]), dict):
            tree[rival[0]].pop(rival[1], None)


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _as_json(tree: dict) -> str:
    # YAML also knows dates and binary data; no recipe key takes one, so as strings they fail, key named.
    return json.dumps(tree, default=str)


def _complaint(error: Any) -> str:
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{location}: unknown key{_nearest(str(error['loc'][-1]), _keys_at(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{location}: missing"
    if error["type"] == "value_error":  # our own message names its keys
        return str(error["ctx"]["error"])
    return f"{location}: {error['msg'].lower()}, got {error['input']!r}"


def _keys_at(location: tuple) -> list[str]:
    section: Any = Recipe
    for name in location:
        section = Source if isinstance(name, int) else section.model_fields[name].annotation
    return list(section.model_fields)


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
