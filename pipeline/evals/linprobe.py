"""`python -m pipeline linprobe`: linear classifiers on a frozen encoder, from top to bottom.

    RUN/accuracy.json    top-1 and top-5 of every learning rate on --val, and which one was chosen by what
    RUN/metrics.jsonl, checkpoints/, ... as of a pre-training run (docs/architecture.md)

Invariant: every rank trains every head on the whole global batch's features, gathered in the order of the
stream; so normalisation, losses and weights do not depend on the number of ranks, and a run that was killed
ends as one that was not. The learning rate is chosen on samples of the training set that no head has seen,
never on --val.

The heads are not DeepSpeed's: LARS needs each weight whole, and they are far smaller than the features that
they share.
"""

import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import all_gather_uneven, init_distributed, raise_on_all_ranks
from pipeline.distributed.hardware import device_name, memory_gib
from pipeline.errors import UserError
from pipeline.evals.accuracy import RESULT, Accuracy, count_topk_correct, topk_accuracies
from pipeline.evals.datasets import open_labelled_sets, verify_checksums
from pipeline.evals.feature_cache import FeatureExtractor, Features
from pipeline.evals.feature_extractor import FrozenEncoder, load_frozen_encoder
from pipeline.evals.linear_heads import LinearHeads
from pipeline.evals.probe_batches import CachedFeatures, RandomCropFeatures
from pipeline.io.atomic import write_json
from pipeline.io.tensors import save_tensors
from pipeline.recipe.linear_probe import ProbeRecipe
from pipeline.recipe.loading import load
from pipeline.train import checkpoint, run_directory, wandb_logger
from pipeline.train.lr_schedule import learning_rate, warmup_warning
from pipeline.train.metric_accumulator import MetricAccumulator
from pipeline.train.metrics import MetricsLogger
from pipeline.train.preemption import WRITE_ERROR, PreemptionHandler
from pipeline.train.watchdog import Watchdog

HEADS = "heads.safetensors"
BLOCK = 4096
"""Samples that are scored at once."""


def linprobe(
    recipe: ProbeRecipe,
    train: str,
    val: str,
    run: Path,
    image_size: int | None = None,
    cache: Path | None = None,
) -> dict:
    """Train the probe on the labelled shard set `train` and judge it on `val`, in the run directory `run`;
    continue where it stands.

    image_size: of the images, None: the encoder's own. cache: a directory for features. Every rank calls it.
    Returns what is in accuracy.json. UserError for what the user can mend; StoppedEarly after a signal.
    """
    # ---- Who we are, what is judged and on what
    preemption = PreemptionHandler()
    with init_distributed(recipe.engine.timeout_minutes) as dist_info, ExitStack() as held:
        preemption.connect(recipe.engine.timeout_minutes)
        accumulation = raise_on_all_ranks(lambda: recipe.accumulation(dist_info.world_size))
        model = raise_on_all_ranks(
            lambda: load_frozen_encoder(recipe.probe.weights, image_size, recipe.probe.pool)
        )
        recipe = _resolved(recipe, model)
        data = recipe.data
        raise_on_all_ranks(lambda: wandb_logger.check_installed(recipe))
        raise_on_all_ranks(lambda: _check(run, recipe))
        sets = raise_on_all_ranks(lambda: open_labelled_sets(train, val, data))
        verify_checksums(dist_info, data=sets.train, val=sets.val)
        held_out = raise_on_all_ranks(lambda: ShardReader(train, data, "held_out") if data.holdout else None)
        raise_on_all_ranks(
            lambda: (
                held.enter_context(run_directory.lock_run_dir(run, recipe)) if dist_info.rank == 0 else None
            )
        )
        timeout_s = 60 * recipe.engine.timeout_minutes
        watchdog = raise_on_all_ranks(
            lambda: held.enter_context(closing(Watchdog(run, dist_info.rank, timeout_s)))
        )

        def heartbeat() -> None:
            watchdog.heartbeat()
            preemption.check()

        extract = FeatureExtractor(
            model,
            dist_info,
            resize=recipe.probe.resize,
            precision=recipe.engine.precision,
            batch=recipe.engine.micro_batch,
            cache=cache,
            heartbeat=heartbeat,
        )
        judged = extract(sets.val)
        chosen_by = extract(held_out) if held_out else None
        torch.manual_seed(recipe.seed)
        heads = LinearHeads(recipe.probe.base_lrs, sets.classes, model.width).to(dist_info.device)

        # ---- Continue where the run directory stands
        checkpoints = run / "checkpoints"
        identity = {"data": sets.train.fingerprint, "world_size": dist_info.world_size}
        newest = checkpoint.latest_valid_checkpoint(checkpoints, dist_info.rank, dist_info.world_size)
        state = checkpoint.read_state(newest) if newest else {"step": 0, "window": None}
        if newest:
            run_directory.check_continuation(newest, state, identity)
            heads.load_state_dict(load_file(newest / HEADS, str(dist_info.device)))
        step = saved_step = state["step"]
        window = MetricAccumulator(state["window"])
        samples = sets.train.num_samples
        batch, total_steps = recipe.data.global_batch, recipe.total_steps(samples)
        warmup = recipe.probe.warmup_epochs * samples / batch
        feed = (CachedFeatures if recipe.probe.center_crops else RandomCropFeatures)(
            recipe, sets.train, extract, step
        )
        log = raise_on_all_ranks(
            lambda: MetricsLogger(run, recipe, step, total_steps, []) if dist_info.rank == 0 else None
        )
        device = device_name(dist_info.device)
        raise_on_all_ranks(lambda: checkpoint.remove_partial(checkpoints, step) if log else None)
        start = {"step": step, "world_size": dist_info.world_size, "device": device}
        described = run, recipe, sets.train.described()
        raise_on_all_ranks(
            lambda: run_directory.describe(*described, **start, before=log.found) if log else None
        )
        if log:
            log.note(
                f"{len(heads.rates)} heads on {model.name}: {samples} images of {sets.classes} classes, "
                f"{total_steps} steps of {batch} on {dist_info.world_size} x {device}"
                + (f", continued after step {step}" if step else "")
            )
            if short := warmup_warning(total_steps, warmup):
                log.note(f"probe.warmup_epochs: {short}")
            if batch > samples:
                log.note(
                    f"data.global_batch: {batch} is more than the {samples} training images: steps see them "
                    f"more than once, and {total_steps} steps are few; a small set wants a small batch"
                )

        def make_sure() -> None:
            """Write a checkpoint."""
            state = {**identity, "window": window.collect(), "recipe": recipe.model_dump(mode="json")}
            raise_on_all_ranks(lambda: log.flush() if log else None)
            raise_on_all_ranks(lambda: _save(heads, checkpoints, step, state, recipe) if log else None)
            watchdog.heartbeat()

        # ---- Train
        began, waited, logged_step = time.perf_counter(), feed.waited, step
        while step < total_steps:
            parts = []
            for _ in range(accumulation):
                parts.append(preemption.next(feed))
                if preemption.reason:
                    break
                watchdog.heartbeat()
            if preemption.reason:
                break
            features, labels = (all_gather_uneven(torch.cat(rows)) for rows in zip(*parts, strict=True))
            rate = learning_rate(step, total_steps, warmup, batch / 256)
            losses = heads.train_step(features, labels, rate)
            step += 1
            zero = torch.zeros((), device=dist_info.device)
            by_rate = {f"loss_{lr:g}": loss for lr, loss in zip(heads.rates, losses, strict=True)}
            window.add({**by_rate, "skipped": zero})

            # ---- Say how it goes
            if step % recipe.train.log_every == 0 or step == total_steps:
                means = window.close()
                took = time.perf_counter() - began
                line = {
                    "step": step,
                    "epoch": step * batch / samples,
                    "samples": step * batch,
                    "time": round(time.time(), 3),
                    "loss": min(means[name] for name in by_rate),
                    **means,
                    "lr": rate,
                    "images_per_s": (step - logged_step) * batch / took,
                    "data_wait": (feed.waited - waited) / took,
                    "memory": memory_gib(dist_info.device),
                }
                if log:
                    with preemption.writing():
                        log.write(line)
                began, waited, logged_step = time.perf_counter(), feed.waited, step
            if log:
                log.advance(step)

            # ---- Make sure of it
            if step % recipe.train.checkpoint_every == 0 or step == total_steps:
                if not preemption.sync_write_errors():
                    break
                make_sure()
                saved_step = step
        if step > saved_step and preemption.reason != WRITE_ERROR:
            make_sure()
            saved_step = step

        # ---- Judge, and close
        result = {}
        if not preemption.reason:
            result = {
                "weights": recipe.probe.weights,
                "features": model.name,
                "image_size": model.image_size,
                "resize": extract.resize,
                "train": {
                    "data": train,
                    "samples": samples,
                    "labels": recipe.data.subset,
                    "by_class": recipe.data.subset_by_class,
                },
                "held_out": {"samples": len(chosen_by.labels) if chosen_by else 0},
                "val": {"data": val, "samples": len(judged.labels)},
                "classes": sets.classes,
                "steps": step,
                "recipe": recipe.model_dump(mode="json"),
                **_judge(heads, sets.classes, judged, chosen_by, dist_info.device),
            }
            raise_on_all_ranks(lambda: write_json(run / RESULT, result) if log else None)
        with watchdog.extended_timeout():
            feed.close()
            with preemption.writing():
                if log:
                    log.close()
            preemption.sync_write_errors()
        if log and not preemption.reason:
            log.note(f"done: {step} steps; {run / RESULT}")
        preemption.raise_reason(saved_step)
        return result


def format_probe(result: dict) -> str:
    """A table for people."""
    train = result["train"]
    share = "" if train["labels"] == 1 else f" ({train['labels']:g} of the labels"
    share += (", class-balanced" if train["by_class"] else "") + ")" if share else ""
    crops = ", centre crops alone" if result["recipe"]["probe"]["center_crops"] else ""
    lines = [
        f"{result['features']}: {train['samples']} training images{share}{crops}, "
        f"{result['held_out']['samples']} held out, {result['val']['samples']} to be judged, "
        f"{result['classes']} classes",
        " base lr   held out                      top-1 [95 % interval]"
        + "         top-5" * ("top5" in result["rates"][0]["val"]),
    ]
    for row in result["rates"]:
        found = [row["held_out"]["top1"] if row["held_out"] else None, *row["val"].values()]
        cells = [str(Accuracy(cell["correct"], cell["total"])) if cell else " " * 25 for cell in found]
        mark = "  <- chosen" if row["base_lr"] == result["chosen"] else ""
        lines.append(f"{row['base_lr']:8g}  " + "   ".join(cells) + mark)
    rates = [row["base_lr"] for row in result["rates"] if row["held_out"]]
    if len(rates) > 1 and result["chosen"] in (min(rates), max(rates)):
        lines.append(
            "The chosen rate is the last of the sweep on its side; a better one may lie beyond: --lr"
        )
    return "\n".join(lines)


def _check(run: Path, recipe: ProbeRecipe) -> None:
    """UserError where `run` is there and no run of this recipe, or of one of another length."""
    run_directory.check(run, recipe)
    if not (run / "recipe.yaml").is_file():
        return
    changed = load(ProbeRecipe, run / "recipe.yaml").differences(recipe)
    for key in ("train.epochs", "train.steps"):
        if key in changed:
            was, now = changed[key]
            raise UserError(
                f"--run {run}: {key} was {was}, is {now}; rates fall towards the end, so another length "
                "is another probe: give a new directory"
            )


def _resolved(recipe: ProbeRecipe, model: FrozenEncoder) -> ProbeRecipe:
    """With what follows from the weights."""
    data = {"image_size": model.image_size, "mean": model.mean, "std": model.std}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "probe": recipe.probe.model_copy(update={"digest": model.digest}),
        }
    )


def _judge(
    heads: LinearHeads, classes: int, val: Features, held_out: Features | None, device: torch.device
) -> dict:
    """Every head on both sets, and the one that is best on what was held out; the smaller rate of equals."""
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
def _accuracies(heads: LinearHeads, head: int, classes: int, on: Features, device: torch.device) -> dict:
    heads.eval()
    found = [
        count_topk_correct(heads(values.to(device), head), labels.to(device))
        for values, labels in zip(*(tensor.split(BLOCK) for tensor in on), strict=True)
    ]
    counts = (sum(column) for column in zip(*found, strict=True))
    return {name: a.as_json() for name, a in topk_accuracies(*counts, len(on.labels), classes).items()}


def _save(heads: LinearHeads, directory: Path, step: int, state: dict, recipe: ProbeRecipe) -> None:
    """Write and publish a checkpoint, on one rank."""
    partial = directory / (checkpoint.checkpoint_name(step) + checkpoint.PARTIAL)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_tensors(heads.state_dict(), partial / HEADS)
        files = checkpoint.fsync_and_hash(partial, checkpoint.list_files(partial))
        checkpoint.publish(directory, step, {"step": step, **state, "files": files}, recipe.train)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: the checkpoint of step {step} cannot be written: {error}") from None
