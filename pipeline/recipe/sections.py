"""The sections of a recipe: model, data, engine, optim, guard, evals and train.

Invariant: a section validates its own keys; the recipe validates keys of different sections against each
other.
"""

import math
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

MIN_SOURCE_SHARE = 1e-6  # smallest weight of a source, of the sum: a block of the mixture draws every source
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 30.0  # backoff before the first retry, and its limit


class Section(BaseModel):
    """A mapping of a recipe: immutable, strict about types, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _run_validate(self) -> Self:
        self._validate()
        return self

    def _validate(self) -> None:
        """Raise ValueError, naming the keys, if values do not fit together."""


def mutable(default: Any, **constraints: Any) -> Any:
    """Declare a key that may change when a run is resumed: it affects how a run executes, not its result."""
    return Field(default, json_schema_extra={"mutable": True}, **constraints)


AUTO = "auto"


def _validate_unless_auto(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    return value if value == AUTO else validate(value)


IntOrAuto = Annotated[int, Field(ge=1), WrapValidator(_validate_unless_auto), PlainSerializer(lambda value: value)]
"""A positive integer, or "auto", which is replaced by one before anything but `is_auto` reads it."""


def is_auto(value: int) -> bool:
    """Return whether a key of type `IntOrAuto` is still to be chosen."""
    return value == AUTO  # pyright: ignore[reportUnnecessaryComparison]


class VitSize(NamedTuple):
    """Width in channels, depth in blocks, and attention heads of a vision transformer."""

    width: int
    depth: int
    heads: int


VIT_SIZES = {
    "vit_tiny": VitSize(192, 12, 3),
    "vit_small": VitSize(384, 12, 6),
    "vit_base": VitSize(768, 12, 12),
    "vit_large": VitSize(1024, 24, 16),
    "vit_huge": VitSize(1280, 32, 16),
}


class RetryPolicy(NamedTuple):
    """Retries with exponential backoff for reads from storage."""

    timeout_s: float
    """Seconds without a byte after which an attempt fails."""
    retries: int
    """Attempts after the first."""
    first_delay_s: float = FIRST_DELAY_S
    """Seconds before the first retry; doubled before each further one, up to MAX_DELAY_S."""

    @property
    def delays_s(self) -> list[float]:
        """Seconds before each retry."""
        return [min(MAX_DELAY_S, self.first_delay_s * 2**number) for number in range(self.retries)]

    @property
    def max_total_s(self) -> float:
        """Seconds after which a read from storage that never responds has failed."""
        return self.timeout_s * (self.retries + 1) + sum(self.delays_s)


class ModelSection(Section):
    """The encoder and the decoder."""

    name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    """Encoder size, as in timm."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a patch, in pixels."""
    width: int | None = Field(default=None, ge=1)
    """Channels of the encoder; null: the named model's."""
    depth: int | None = Field(default=None, ge=1)
    """Blocks of the encoder; null: the named model's."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads of the encoder; null: the named model's."""
    decoder_width: int = Field(default=512, ge=1)
    """Channels of the decoder."""
    decoder_depth: int = Field(default=8, ge=1)
    """Blocks of the decoder."""
    decoder_heads: int = Field(default=16, ge=1)
    """Attention heads of the decoder."""

    def _validate(self) -> None:
        for prefix, width, heads in (
            ("", self.size.width, self.size.heads),
            ("decoder_", self.decoder_width, self.decoder_heads),
        ):
            if width % 4 or width % heads:
                raise ValueError(
                    f"model.{prefix}width: {width} must be a multiple of model.{prefix}heads, {heads}, and "
                    "of 4 (2-D sine-cosine positions)"
                )

    @property
    def size(self) -> VitSize:
        """Size of the encoder, with this section's width, depth and heads if given."""
        named = VIT_SIZES[self.name]
        return VitSize(self.width or named.width, self.depth or named.depth, self.heads or named.heads)


class Source(Section):
    """One shard set."""

    path: str = Field(min_length=1)
    """A directory, or a URL that fsspec can open."""
    weight: float | None = Field(default=None, gt=0.0)
    """Share of the drawn samples, relative to the other sources' weights; null: no mixture."""


class DataSection(Section):
    """Which samples are read, how they are transformed, and how they are loaded."""

    sources: tuple[Source, ...] | None = mutable(None, min_length=1)
    """Shard sets, if --data does not name them. Without weights, an epoch reads every sample of every set
    once; with weights (for all sets or none), samples are drawn in these proportions."""
    subset: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the samples to train on, selected by a hash of their keys."""
    subset_by_class: bool = False
    """Select `subset` of every class, at least one sample each, instead of all samples."""
    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the samples, selected by hash, to keep out of training for validation."""
    image_size: int = Field(default=224, ge=1)
    """Side of the model's input image, in pixels."""
    global_batch: int = Field(default=4096, ge=1, le=2**20)
    """Images per optimizer step, over all ranks and gradient accumulation steps."""
    augmentation: Literal["random_size", "fixed_size", "none", "color_jitter"] = "random_size"
    """MAE's Table 1 (e): random resized crops; squares of a fixed size at a random position; evaluation's center
    crop, never flipped; or random resized crops with color jitter. Crops of a fixed size ignore crop_scale and
    crop_ratio."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of a random resized crop's area, as a share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a random resized crop's aspect ratio, width over height."""
    flip: bool = True
    """Flip half of the images horizontally."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channels (0 to 1) to subtract."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the red, green and blue channels (0 to 1) to divide by."""
    shuffle_window_shards: int = Field(default=16, ge=1)
    """Shards per shuffle window: more shuffle better, fewer read more locally."""
    read_threads: int = mutable(4, ge=1)
    """Read-ahead threads per rank."""
    read_ahead_mb: int = mutable(256, ge=1)
    """Megabytes (10^6 bytes) of encoded images that a rank may buffer between storage and decoder."""
    timeout_s: float = mutable(30.0, gt=0.0)
    """Seconds without a byte after which a read fails and is retried."""
    retries: int = mutable(5, ge=0)
    """Retries of a read before the run stops, with a backoff of 0.5, 1, 2, ... 30 s."""
    cache_dir: str | None = mutable(None)
    """Directory on the node's local disk in which to cache whole shards; null: no cache."""
    cache_gb: float | None = mutable(None, gt=0.0)
    """Size limit of cache_dir in gigabytes (10^9 bytes); the least recently used shards are deleted first."""
    decode_threads: int | None = mutable(None, ge=1)
    """Decoding threads per rank; null: the rank's share of the machine's cores."""
    prefetch: int | None = mutable(None, ge=1)
    """Batches to decode ahead; null: 2 on a CPU, 3 on a GPU."""
    roi_decode: bool = mutable(False)
    """On a GPU, decode only the region of an image that is cropped, instead of the whole image. Less memory and time
    for photographs of several megapixels, but nvImageCodec 0.9 is reported to crash with it (docs/loader.md)."""
    hw_decoder_load: float = mutable(0.65, ge=0.0, le=1.0)
    """On a GPU with a hardware JPEG decoder, share of a batch's JPEGs that it decodes. With 0 or 1, an image's pixels
    do not depend on its batch."""
    crops_per_image: int = Field(default=1, ge=1, le=256)
    """Consecutive crops of each decoded image (repeated augmentation, Hoffer et al. 2020). The global batch,
    steps and epochs count crops."""
    max_undecodable: int = mutable(100, ge=0)
    """Undecodable samples per rank to substitute by their neighbors before the run stops."""
    trace: bool = mutable(False)
    """Write the keys of every step's samples, and digests of their pixels, to RUN/samples/."""

    def _validate(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"data.{name}: [{low}, {high}] is not a range of positive numbers")
        if self.crop_scale[1] > 1:
            raise ValueError(f"data.crop_scale: {self.crop_scale[1]} must be at most 1, the whole image")
        if min(self.std) <= 0:
            raise ValueError("data.std: each of the three numbers must be positive")
        if (self.cache_dir is None) != (self.cache_gb is None):
            raise ValueError("data.cache_dir, data.cache_gb: give both or neither")
        self._validate_sources()

    def _validate_sources(self) -> None:
        sources = self.sources or ()
        paths = [source.path for source in sources]
        weights = [source.weight for source in sources if source.weight is not None]
        if len(set(paths)) < len(paths):
            raise ValueError(f"data.sources: {max(paths, key=paths.count)} is given twice")
        if weights and len(weights) < len(sources):
            raise ValueError("data.sources: give every source a weight, or none")
        if weights and min(weights) < MIN_SOURCE_SHARE * sum(weights):
            smallest = f"{min(weights):g} is less than {MIN_SOURCE_SHARE:g}"
            raise ValueError(f"data.sources: weight {smallest} of the sum of the weights; increase it")


class EngineSection(Section):
    """How the model is executed: sharding, precision and batch split."""

    zero_stage: Literal[0, 1, 2, 3] = mutable(1)
    """DeepSpeed's ZeRO stage."""
    offload: Literal["none", "optimizer"] = mutable("none")
    """optimizer: keep and update fp32 weights and moments on the CPU; requires ZeRO 2 or 3."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the forward and backward pass; the optimizer always updates fp32 weights."""
    micro_batch: IntOrAuto = mutable(64)
    """Images per rank and forward pass. The number of gradient accumulation steps follows from it. auto: the largest
    divisor of a rank's share of the global batch that fits into its GPU and still gains speed (docs/engine.md)."""
    activation_checkpointing: bool = mutable(False)
    """Recompute each transformer block's activations in the backward pass: less memory, more time."""
    compile: bool = mutable(False)
    """Apply torch.compile to the transformer blocks."""
    deterministic: bool = mutable(False)
    """Use deterministic algorithms only, which are slower: the same GPUs give the same losses, bit for bit."""
    timeout_minutes: float = mutable(10.0, gt=0.0)
    """Minutes without progress after which a rank exits, and the run with it; six times as long for
    checkpoints and rollbacks. Must exceed the time that a read may take (data.timeout_s, data.retries)."""

    def _validate(self) -> None:
        if self.offload != "none" and self.zero_stage < 2:
            raise ValueError(f"engine.offload: {self.offload} requires engine.zero_stage 2 or 3, not {self.zero_stage}")


class OptimSection(Section):
    """AdamW and its schedule: linear warm-up, then a decay."""

    base_lr: float = Field(default=1.5e-4, gt=0.0)
    """Learning rate for a global batch of 256; the peak learning rate is base_lr x global_batch / 256."""
    min_lr: float = Field(default=0.0, ge=0.0)
    """Learning rate at the end of the schedule."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    weight_decay: float = Field(default=0.05, ge=0.0)
    """Decoupled weight decay; one-dimensional parameters (biases, norms) have none."""
    warmup_epochs: float | None = Field(default=None, ge=0.0)
    """Epochs of linear warm-up; or give warmup_steps."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["cosine", "linear", "steps"] = "cosine"
    """After the warm-up: half a cosine or a straight line to min_lr, or a division by 10 at each of decay_steps."""
    decay_steps: tuple[float, ...] = ()
    """Shares of the run, in (0, 1), at which decay "steps" divides the learning rate by 10."""
    clip_grad: float | None = Field(default=None, gt=0.0)
    """Maximum L2 norm of the gradient; null: no clipping."""

    def _validate(self) -> None:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("optim.warmup_steps, optim.warmup_epochs: give at most one of the two")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: {list(self.betas)} must lie in [0, 1)")
        if bool(self.decay_steps) != (self.decay == "steps"):
            raise ValueError("optim.decay, optim.decay_steps: give decay_steps with decay: steps, and only then")
        if not all(0 < share < 1 for share in self.decay_steps):
            raise ValueError(f"optim.decay_steps: {list(self.decay_steps)} must lie in (0, 1)")


class GuardSection(Section):
    """When the guard skips a step, rolls back and gives up: pipeline/train/guard.py."""

    window: int = mutable(128, ge=8)
    """Good steps whose losses define the expected loss; no loss is a spike before there are as many."""
    spike_z: float | None = mutable(10.0, gt=0.0)
    """Robust standard deviations above the median at which a loss is a spike; null: no loss is."""
    max_consecutive_skips: int = mutable(8, ge=1)
    """Consecutive skipped steps that trigger a rollback; the run then skips the data of these steps."""
    max_rollbacks: int = mutable(3, ge=0)
    """Consecutive rollbacks, with no new checkpoint in between, after which the run stops."""


class EvalsSection(Section):
    """Evaluation during pre-training: pipeline/evals/online_knn.py."""

    knn_every: int | None = mutable(None, ge=1)
    """Steps between k-NN evaluations on the labeled shard set; null: none."""
    knn_samples: int = mutable(5000, ge=1)
    """Images used: a fifth are queries, the others are the reference set."""


class TrainSection(Section):
    """Length of the run, logging and checkpoints."""

    steps: int | None = mutable(None, ge=1)
    """Optimizer steps of the whole run; or give epochs."""
    epochs: float | None = mutable(None, gt=0.0)
    """Epochs of the whole run."""
    log_every: int = mutable(20, ge=1)
    """Steps between log lines."""
    checkpoint_every: int = mutable(1000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = mutable(3, ge=1)
    """Number of latest checkpoints to keep."""
    ema_decay: float | None = Field(default=None, gt=0.5, lt=1.0)
    """Decay of an exponential moving average (EMA) of the weights, in fp32, updated after every step that was
    not skipped: ema += (1 - ema_decay) x (weights - ema). null: no EMA."""
    keep_every: int | None = mutable(None, ge=1)
    """Also keep checkpoints of steps that are multiples of this; null: none."""
    wandb: str | None = mutable(None, min_length=1)
    """Weights & Biases project to log metrics to; null: none."""
    profile_steps: tuple[int, int] | None = mutable(None)
    """First and last step, counted from 1, that torch.profiler traces on rank 0; null: none."""

    def _validate(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("train.steps, train.epochs: give one of the two")
        if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            steps = list(self.profile_steps)
            raise ValueError(f"train.profile_steps: {steps} are no first and last step, counted from 1")

    def total_steps(self, num_samples: int, global_batch: int) -> int:
        """Return the number of steps of the run, rounded up."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return math.ceil(self.epochs * num_samples / global_batch)


def eval_crop_pct(image_size: int) -> float:
    """Return the side of the center crop over the shorter side of the resized image (timm's crop_pct).

    As in MAE's build_transform: 224/256 for sizes up to 224 px, else 1.
    """
    return 224 / 256 if image_size <= 224 else 1.0


def eval_resize_size(image_size: int) -> int:
    """Return the shorter side in pixels to resize to before the center crop of `image_size` pixels."""
    return int(image_size / eval_crop_pct(image_size))
