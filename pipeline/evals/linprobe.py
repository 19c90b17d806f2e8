"""`python -m pipeline linprobe`: linear classifiers on a frozen encoder.

    RUN/results.json     top-1 and top-5 of every learning rate on --val, and which rate was chosen
    RUN/metrics.jsonl, checkpoints/, ... as for pre-training (docs/architecture.md)

Invariant: every rank trains every head on the features of the whole global batch, gathered in stream order; so
normalization, losses and weights do not depend on the world size. The learning rate is chosen on held-out samples
of the training set, never on --val.

The heads are not sharded by DeepSpeed: LARS needs each weight as a whole, and the heads are much smaller than the
features.
"""

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import all_gather_uneven, init_process_group, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.accuracy import Accuracy, count_topk_correct, topk_accuracies
from pipeline.evals.datasets import open_labeled_sets, verify_checksums
from pipeline.evals.feature_cache import Features
from pipeline.evals.feature_extractor import FeatureExtractor
from pipeline.evals.frozen_encoder import FrozenEncoder, load_frozen_encoder
from pipeline.evals.linear_heads import LinearHeads
from pipeline.evals.probe_batches import CachedFeatures, RandomCropFeatures
from pipeline.io.atomic import write_json
from pipeline.io.tensors import save_tensors
from pipeline.recipe.linear_probe import ProbeRecipe
from pipeline.recipe.loading import load
from pipeline.train.lr_schedule import learning_rate, warmup_warning
from pipeline.train.run_directory import RunDirectory
from pipeline.train.throughput import ThroughputMeter
from pipeline.train.train_loop import TrainLoop
from pipeline.train.wandb_logger import check_installed

logger = logging.getLogger(__name__)
HEADS = "heads.safetensors"
BLOCK = 4096
"""Samples that are scored at once."""


def linprobe(
    recipe: ProbeRecipe, train: str, val: str, run: Path, image_size: int | None = None, cache: Path | None = None
) -> dict:
    """Train a linear probe, or resume it, and evaluate it. Every rank calls it.

    Args:
        recipe: The probe's recipe.
        train: Labeled shard set to train on.
        val: Labeled shard set to evaluate on.
        run: The run directory.
        image_size: In pixels; None for the encoder's own.
        cache: Directory for features; None to keep none.

    Returns:
        The content of results.json.

    Raises:
        UserError: If the user has to fix something.
        StoppedEarly: After a signal.
    """
    probe = LinearProbe(recipe, train, val, RunDirectory(run), image_size, cache)
    probe.train()
    return probe.result


class LinearProbe(TrainLoop[ProbeRecipe, CachedFeatures | RandomCropFeatures]):
    """Trains one linear head per learning rate. Arguments as for `linprobe`."""

    def __init__(
        self,
        recipe: ProbeRecipe,
        train: str,
        val: str,
        run: RunDirectory,
        image_size: int | None = None,
        cache: Path | None = None,
    ):
        super().__init__(recipe, run)
        self._paths, self._image_size, self._cache = (train, val), image_size, cache
        self._lr = 0.0
        self.result: dict = {}

    def connect(self, dist_info: DistInfo) -> None:
        init_process_group(dist_info, self.recipe.engine.timeout_minutes)

    def prepare(self) -> None:
        raise_on_all_ranks(self._prepare)
        verify_checksums(self.session.dist_info, data=self.sets.train, val=self.sets.val)

    def _prepare(self) -> None:
        probe = self.recipe.probe
        self.accumulation_steps = self.recipe.gradient_accumulation_steps(self.session.dist_info.world_size)
        self.model = load_frozen_encoder(probe.weights, self._image_size, probe.pool)
        self.recipe = _with_encoder_settings(self.recipe, self.model)
        check_installed(self.recipe)
        check_run(self.run, self.recipe)
        data = self.recipe.data
        self.sets = open_labeled_sets(*self._paths, data)
        self.held_out_reader = ShardReader(self._paths[0], data, "held_out") if data.holdout else None
        self.num_samples, self.fingerprint = self.sets.train.num_samples, self.sets.train.fingerprint
        self.total_steps = self.recipe.total_steps(self.num_samples)
        self.warmup_steps = probe.warmup_epochs * self.num_samples / data.global_batch

    def build(self) -> None:
        recipe, session = self.recipe, self.session

        def heartbeat() -> None:
            session.watchdog.heartbeat()
            session.preemption.raise_if_requested()

        self.extract = FeatureExtractor(
            self.model,
            session.dist_info,
            resize=recipe.probe.resize,
            precision=recipe.engine.precision,
            batch=recipe.engine.micro_batch,
            cache=self._cache,
            heartbeat=heartbeat,
        )
        self.val = self.extract(self.sets.val)
        self.held_out = self.extract(self.held_out_reader) if self.held_out_reader else None
        torch.manual_seed(recipe.seed)
        heads = LinearHeads(recipe.probe.base_lrs, self.sets.classes, self.model.width)
        self.heads = heads.to(session.dist_info.device)
        self.throughput = ThroughputMeter(recipe, 0.0, session.dist_info)

    def load(self, path: Path | None, state: dict) -> None:
        if path:
            self.heads.load_state_dict(load_file(path / HEADS, str(self.session.dist_info.device)))
        source = CachedFeatures if self.recipe.probe.center_crops else RandomCropFeatures
        self.loader = source(self.recipe, self.sets.train, self.extract, self.state.step)

    def on_train_start(self) -> None:
        batch, device = self.recipe.data.global_batch, self.session.dist_info.device.type
        resumed = f", resumed after step {self.state.step}" if self.state.step else ""
        logger.info(
            f"{len(self.heads.rates)} heads on {self.model.name}: {self.num_samples} images of "
            f"{self.sets.classes} classes, {self.total_steps} steps of {batch} on "
            f"{self.session.dist_info.world_size} x {device}{resumed}"
        )
        if warning := warmup_warning(self.total_steps, self.warmup_steps):
            logger.warning(f"probe.warmup_epochs: {warning}")
        if batch > self.num_samples:
            logger.warning(
                f"data.global_batch: {batch} is more than the {self.num_samples} training images; use a smaller batch "
                "for more steps"
            )

    def train_step(self) -> bool:
        step, parts = self.state.step, []
        for _ in range(self.accumulation_steps):
            part = self.session.preemption.next_batch(self.loader)
            if part is None:
                return False
            parts.append(part)
            self.session.watchdog.heartbeat()
        features, labels = (all_gather_uneven(torch.cat(rows)) for rows in zip(*parts, strict=True))
        self._lr = self.learning_rate_at(step, self.total_steps)
        with self.throughput.time_compute():
            losses = self.heads.train_step(features, labels, self._lr)
        self.state.step += 1
        metrics = {f"loss_{rate:g}": loss for rate, loss in zip(self.heads.rates, losses, strict=True)}
        self.state.metrics.add({**metrics, "skipped": torch.zeros((), device=losses.device)})
        return True

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        return learning_rate(step, total_steps, self.warmup_steps, self.recipe.data.global_batch / 256)

    def current_lr(self) -> float:
        return self._lr

    def extra_metrics(self, means: dict) -> dict:
        return {"loss": min(means[f"loss_{rate:g}"] for rate in self.heads.rates)}

    def metadata(self) -> dict:
        return {"data": self.sets.train.source_info()}

    def write_part(self, directory: Path) -> None:
        """Write nothing: every rank has the same heads."""

    def write_shared(self, directory: Path) -> None:
        save_tensors(self.heads.state_dict(), directory / HEADS)

    def on_train_end(self) -> None:
        """Evaluate all heads and write results.json."""
        recipe, classes, device = self.recipe, self.sets.classes, self.session.dist_info.device
        self.result = {
            "weights": recipe.probe.weights,
            "features": self.model.name,
            "image_size": self.model.image_size,
            "resize": self.extract.resize,
            "train": {
                "data": self._paths[0],
                "samples": self.num_samples,
                "labels": recipe.data.subset,
                "by_class": recipe.data.subset_by_class,
            },
            "held_out": {"samples": len(self.held_out.labels) if self.held_out else 0},
            "val": {"data": self._paths[1], "samples": len(self.val.labels)},
            "classes": classes,
            "steps": self.state.step,
            "recipe": recipe.model_dump(mode="json"),
            **evaluate_heads(self.heads, classes, self.val, self.held_out, device),
        }
        self.session.on_rank_0(lambda: write_json(self.run.results, self.result))

    def close(self) -> None:
        self.loader.close()


def format_probe(result: dict) -> str:
    """Return results.json as a table."""
    train = result["train"]
    share = "" if train["labels"] == 1 else f" ({train['labels']:g} of the labels"
    share += (", class-balanced" if train["by_class"] else "") + ")" if share else ""
    crops = ", center crops only" if result["recipe"]["probe"]["center_crops"] else ""
    lines = [
        f"{result['features']}: {train['samples']} training images{share}{crops}, "
        f"{result['held_out']['samples']} held out, {result['val']['samples']} validation images, "
        f"{result['classes']} classes",
        " base lr   held out                      top-1 [95 % interval]"
        + "         top-5" * ("top5" in result["rates"][0]["val"]),
    ]
    for row in result["rates"]:
        accuracies = [row["held_out"]["top1"] if row["held_out"] else None, *row["val"].values()]
        cells = [str(Accuracy(cell["correct"], cell["total"])) if cell else " " * 25 for cell in accuracies]
        mark = "  <- chosen" if row["base_lr"] == result["chosen"] else ""
        lines.append(f"{row['base_lr']:8g}  " + "   ".join(cells) + mark)
    rates = [row["base_lr"] for row in result["rates"] if row["held_out"]]
    if len(rates) > 1 and result["chosen"] in (min(rates), max(rates)):
        lines.append("The chosen rate is at the edge of the sweep; extend the sweep with --lr")
    return "\n".join(lines)


def check_run(run: RunDirectory, recipe: ProbeRecipe) -> None:
    """Raise UserError if the run directory is not a run of this recipe, or one with another number of steps."""
    run.check(recipe)
    if not run.recipe_file.is_file():
        return
    changed = load(ProbeRecipe, run.recipe_file).differences(recipe)
    for key in ("train.epochs", "train.steps"):
        if key in changed:
            old, new = changed[key]
            raise UserError(
                f"--run {run}: {key} was {old}, is {new}; the learning rate depends on it; use the old value or a new "
                "--run"
            )


def evaluate_heads(
    heads: LinearHeads, classes: int, val: Features, held_out: Features | None, device: torch.device
) -> dict:
    """Evaluate every head, and choose the best one on the held-out samples; of equal ones the smaller rate.

    Returns:
        "rates": one row per head; "chosen": the base learning rate; and the chosen head's accuracies on `val`.
    """
    rows = [
        {
            "base_lr": rate,
            "held_out": _accuracies(heads, head, classes, held_out, device) if held_out else None,
            "val": _accuracies(heads, head, classes, val, device),
        }
        for head, rate in enumerate(heads.rates)
    ]
    best = rows[0]
    if held_out:
        best = max(rows, key=lambda row: (row["held_out"]["top1"]["correct"], -row["base_lr"]))
    return {"rates": rows, "chosen": best["base_lr"], **best["val"]}


@torch.inference_mode()
def _accuracies(heads: LinearHeads, head: int, classes: int, features: Features, device: torch.device) -> dict:
    heads.eval()
    counts = [
        count_topk_correct(heads(values.to(device), head), labels.to(device))
        for values, labels in zip(*(tensor.split(BLOCK) for tensor in features), strict=True)
    ]
    top1, top5 = (sum(column) for column in zip(*counts, strict=True))
    return {name: a.as_json() for name, a in topk_accuracies(top1, top5, len(features.labels), classes).items()}


def _with_encoder_settings(recipe: ProbeRecipe, model: FrozenEncoder) -> ProbeRecipe:
    """Fill in what the weights determine."""
    data = {"image_size": model.image_size, "mean": model.mean, "std": model.std}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "probe": recipe.probe.model_copy(update={"digest": model.digest}),
        }
    )
