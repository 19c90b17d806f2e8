"""The sections of a recipe: model, data, engine, optim, guard and train.

Invariant: a section that exists is possible by itself; what holds between sections is the recipe's to check.
"""

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

SMALLEST_SHARE = 1e-6  # of a source in a mix: a block of the mix draws every source


FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before another try


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Size(NamedTuple):
    width: int
    depth: int
    heads: int


SIZES = {
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_huge": Size(1280, 32, 16),
}


class RetryPolicy(NamedTuple):
    """timeout_s: seconds without a sign of life that end a try; retries: tries after the first; first_wait_s:
    seconds before the second try, doubled before each further one."""

    timeout_s: float
    retries: int
    first_wait_s: float = FIRST_WAIT

    @property
    def delays_s(self) -> list[float]:
        """Seconds before each retry."""
        return [min(LONGEST_WAIT, self.first_wait_s * 2**number) for number in range(self.retries)]

    @property
    def max_total_s(self) -> float:
        """Seconds after which a store that never answers has failed."""
        return self.timeout_s * (self.retries + 1) + sum(self.delays_s)


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

    @model_validator(mode="after")
    def _validate(self) -> "ModelSection":
        for name, width, heads in (
            ("", self.size.width, self.size.heads),
            ("decoder_", self.decoder_width, self.decoder_heads),
        ):
            if width % 4 or width % heads:
                raise ValueError(
                    f"model.{name}width: {width} must be a multiple of model.{name}heads, {heads}, and of 4"
                    f" (2-D sine-cosine positions)"
                )
        return self

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
    subset_by_class: bool = False
    """Take that share of every class, at least one sample each, instead of all samples: few labels."""
    holdout: float = Field(0.0, ge=0.0, lt=1.0)
    """Keep this share of the samples, chosen likewise, out of training, for validation."""
    image_size: int = Field(224, ge=1)
    global_batch: int = Field(4096, ge=1, le=2**20)
    """Images a step, over all ranks and accumulation steps."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random resized crop covers, from and to."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    shuffle_window_shards: int = Field(16, ge=1)
    """Samples mix freely inside windows of so many shards: more mixes better, fewer reads more locally."""
    read_threads: int = Field(4, ge=1)
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
    decode_threads: int | None = Field(None, ge=1)
    """Decoding threads a rank; null: the machine's cores shared evenly by its ranks."""
    prefetch: int | None = Field(None, ge=1)
    """Batches decoded ahead; null: 2, on a GPU 3."""
    crops_per_image: int = Field(1, ge=1, le=256)
    """Crops of each image that follow each other in the stream, for one decode (repeated augmentation, Hoffer
    et al. 2020). The global batch, steps and epochs count crops."""
    max_undecodable: int = Field(100, ge=0)
    """Samples that a rank may find undecodable, and replace by their neighbours, before the run stops."""
    trace: bool = False
    """Write the samples of every step, and digests of their pixels, to samples/ in the run directory."""

    @model_validator(mode="after")
    def _validate(self) -> "DataSection":
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"data.{name}: [{low}, {high}] is not a range of positive numbers")
        if self.crop_scale[1] > 1:
            raise ValueError(f"data.crop_scale: {self.crop_scale[1]} is more than the whole image")
        if min(self.std) <= 0:
            raise ValueError("data.std: each of the three must be positive")
        if (self.cache_dir is None) != (self.cache_gb is None):
            raise ValueError("data.cache_dir, data.cache_gb: give both or neither")
        self._validate_sources()
        return self

    def _validate_sources(self) -> None:
        sources = self.sources or ()
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


class EngineSection(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: the fp32 weights and moments live in the host's memory and are updated by its
    CPU. With zero_stage 2 or 3."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    micro_batch: int = Field(64, ge=1)
    """Images a rank takes through the model at once. The accumulation steps follow from it."""
    activation_checkpointing: bool = False
    """Compute each transformer block's activations again in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the method's forward."""
    timeout_minutes: float = Field(10.0, gt=0.0)
    """A rank that makes no progress for so long ends itself, and with it the run. A checkpoint, or the
    guard's return to one, may take six times as long. More than a read may take (data.timeout_s, retries)."""

    @model_validator(mode="after")
    def _validate(self) -> "EngineSection":
        if self.offload != "none" and self.zero_stage < 2:
            raise ValueError(
                f"engine.offload: {self.offload} goes with engine.zero_stage 2 or 3, not {self.zero_stage}"
            )
        return self


class OptimSection(Section):
    base_lr: float = Field(1.5e-4, gt=0.0)
    """Learning rate for a batch of 256; the rate in use is base_lr x global_batch / 256."""
    min_lr: float = Field(0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0.0)
    warmup_epochs: float | None = Field(None, ge=0.0)
    warmup_steps: int | None = Field(None, ge=0)
    clip_grad: float | None = Field(None, gt=0.0)

    @model_validator(mode="after")
    def _validate(self) -> "OptimSection":
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("optim.warmup_steps, optim.warmup_epochs: give at most one of the two")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: {list(self.betas)} must lie in [0, 1)")
        return self


class GuardSection(Section):
    """When a step is skipped, and what follows: pipeline/train/guard.py."""

    window: int = Field(128, ge=8)
    """Losses of so many good steps say what a loss should be; until there are as many, no loss is a spike."""
    spike_z: float | None = Field(10.0, gt=0.0)
    """A loss so many robust standard deviations over their median is a spike; null: no loss is."""
    max_consecutive_skips: int = Field(8, ge=1)
    """So many skipped steps in a row: the run goes back to an earlier checkpoint and on with other data."""
    max_rollbacks: int = Field(3, ge=0)
    """So many returns without getting past the trouble: the run stops at the next."""


class EvalsSection(Section):
    """What is measured while a run trains: pipeline/evals/online_knn.py."""

    knn_every: int | None = Field(None, ge=1)
    """Steps between two k-NN classifications of images of the labelled shard set; null: none."""
    knn_samples: int = Field(5000, ge=1)
    """Images that take part: a fifth are classified by the others."""


class TrainSection(Section):
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0.0)
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(3, ge=1)
    """So many of the newest checkpoints stay."""
    ema_decay: float | None = Field(None, gt=0.5, lt=1.0)
    """Keep an exponential moving average of the weights, in fp32: average += (1 - ema_decay) x (weights -
    average) after every step that was not skipped. null: none."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints of steps that are multiples of this stay for good; null: none does."""
    wandb: str | None = Field(None, min_length=1)
    """The Weights & Biases project that the metrics also go to; null: they don't."""
    profile_steps: tuple[int, int] | None = None
    """First and last of the steps that torch.profiler traces on rank 0; null: none."""

    @model_validator(mode="after")
    def _validate(self) -> "TrainSection":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("train.steps, train.epochs: give one of the two")
        if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(
                f"train.profile_steps: {list(self.profile_steps)} are no first and last step, counted from 1"
            )
        return self


def crop_share(image_size: int) -> float:
    """The evaluated square over the image's shorter side: 224/256 up to 224 px, all of it above, as in MAE's
    build_transform."""
    return 224 / 256 if image_size <= 224 else 1.0


def resize_of(image_size: int) -> int:
    """Pixels of the shorter side before the centre is cut out, for evaluation at `image_size`."""
    return int(image_size / crop_share(image_size))
