"""The story of a run, from top to bottom. What is trained is a `Task`: pre-training or fine-tuning.

Invariant: what is trained is a function of recipe and data alone. Killed anywhere and started again with the
same command, a run ends with the same weights and the same logged losses: to the bit on the same number of
ranks at the same ZeRO stage, else to what another order of summation leaves.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.data.undecodable import UndecodableSamples
from pipeline.distributed.collectives import destroy_process_group_on_exit, raise_on_all_ranks
from pipeline.distributed.hardware import device_name
from pipeline.distributed.launch import init_dist_env
from pipeline.errors import AllRanksError
from pipeline.train import checkpoint, engine, run_directory, wandb_logger
from pipeline.train.ema import ModelEma
from pipeline.train.engine_config import engine_config, unused
from pipeline.train.guard import BadSpan, Guard
from pipeline.train.lr_schedule import learning_rate, warmup_warning
from pipeline.train.metric_accumulator import MetricAccumulator
from pipeline.train.metrics import MetricsLogger
from pipeline.train.preemption import WRITE_ERROR, PreemptionHandler
from pipeline.train.profiler import Profiler
from pipeline.train.rollback import rollback, write_offending_samples
from pipeline.train.sample_trace import SampleTrace, truncate_after
from pipeline.train.task import Task
from pipeline.train.throughput import ThroughputMeter
from pipeline.train.watchdog import Watchdog


def train(task: Task, data: Sequence[str], run: Path, deepspeed_config: Path | None = None) -> None:
    """Train on the shard sets `data`, or the recipe's own where that is empty, in the run directory `run`;
    continue where it stands.

    deepspeed_config: the user's file instead of one of ds_configs/. Every rank calls it. Raises UserError for
    what the user can mend, before anything is written, or with everything saved; StoppedEarly where a
    signal ended it before its time; Diverged where the guard gives up.
    """
    with ExitStack() as held, destroy_process_group_on_exit():
        _train(task, data, run, deepspeed_config, held)


def _train(
    task: Task, data: Sequence[str], run: Path, deepspeed_config: Path | None, held: ExitStack
) -> None:
    """held: the lock and the watchdog, until the ranks have parted."""
    # ---- Who we are, and whether what is asked is possible
    recipe = task.recipe
    preemption = PreemptionHandler()
    dist_info = init_dist_env()
    accumulation = recipe.accumulation(dist_info.world_size)
    config = engine_config(recipe, dist_info.world_size, deepspeed_config)
    left_out = unused(deepspeed_config, recipe) if deepspeed_config else []
    wandb_logger.check_installed(recipe)
    run_directory.check(run, recipe)
    reader = ShardReader(recipe.sources(data), recipe.data)
    num_samples = reader.num_samples
    total_steps = recipe.total_steps(num_samples)
    warmup_steps = recipe.warmup_steps(num_samples)

    # ---- What is trained, with whom, and where
    torch.manual_seed(recipe.seed)
    module = task.build(reader)
    engine.init_distributed(recipe.engine.timeout_minutes)
    preemption.connect(recipe.engine.timeout_minutes)
    unchecked = raise_on_all_ranks(lambda: reader.check_bytes(dist_info.rank, dist_info.world_size))
    raise_on_all_ranks(lambda: engine.check_config(config))
    raise_on_all_ranks(lambda: engine.check_precision(recipe))
    raise_on_all_ranks(
        lambda: held.enter_context(run_directory.lock_run_dir(run, recipe)) if dist_info.rank == 0 else None
    )
    timeout_s = 60 * recipe.engine.timeout_minutes
    watchdog = raise_on_all_ranks(
        lambda: held.enter_context(closing(Watchdog(run, dist_info.rank, timeout_s)))
    )

    # ---- Continue where the run directory stands
    checkpoints = run / "checkpoints"
    identity = {
        "data": reader.fingerprint,
        "world_size": dist_info.world_size,
        "zero_stage": recipe.engine.zero_stage,
    }
    threads = recipe.data.decode_threads or dist_info.num_cpus
    undecodable = UndecodableSamples(reader, recipe.data.max_undecodable, run / "replaced", dist_info.rank)

    def open_log(step: int, guard: Guard) -> MetricsLogger:
        truncate_after(run, step)
        return MetricsLogger(run, recipe, step, total_steps, guard.rollbacks)

    def stand(
        found: Path | None,
    ) -> tuple[int, MetricAccumulator, Guard, MetricsLogger | None, SampleTrace | None, Loader]:
        """Everything as it was when the checkpoint was written; None: as it is at the beginning."""
        state = checkpoint.read_state(found) if found else {"step": 0, "window": None, "guard": None}
        step, window = state["step"], MetricAccumulator(state["window"])
        guard = Guard(recipe.guard, recipe.engine.precision, dist_info.device, state["guard"])
        if found:
            engine.load(model, model_ema, checkpoints, found.name)
        log = raise_on_all_ranks(lambda: open_log(step, guard) if dist_info.rank == 0 else None)
        trace = raise_on_all_ranks(lambda: SampleTrace(run, dist_info.rank) if recipe.data.trace else None)
        place = dist_info.device, dist_info.rank, dist_info.world_size, step
        loader = Loader(
            reader, recipe, module.noise_size, *place, threads, guard.offset, undecodable, task.labelled
        )
        return step, window, guard, log, trace, loader

    with watchdog.extended_timeout():
        model = engine.build_engine(recipe, module, config, dist_info.device)
        decay = recipe.train.ema_decay
        model_ema = ModelEma(model, decay) if decay else None
        newest = checkpoint.latest_valid_checkpoint(checkpoints, dist_info.rank, dist_info.world_size)
        left = checkpoint.read_state(newest) if newest else {}
        if newest:
            run_directory.check_continuation(newest, left, identity)
        step, window, guard, log, trace, loader = stand(newest)
        saved_step = step
        raise_on_all_ranks(lambda: checkpoint.remove_partial(checkpoints, step) if log else None)
        device = device_name(dist_info.device)
        start = {"step": step, "world_size": dist_info.world_size, "device": device, "deepspeed": config}
        described = run, recipe, reader.described()
        raise_on_all_ranks(
            lambda: run_directory.describe(*described, **start, before=log.found) if log else None
        )
        task.begin(run, reader, module, dist_info)
    if log:
        log.note(
            f"{task.title}: {num_samples} images, {total_steps} steps of "
            f"{recipe.data.global_batch} = {dist_info.world_size} ranks x {accumulation} x {recipe.engine.micro_batch} "
            f"on {device}, {recipe.engine.precision}" + (f", continued after step {step}" if step else "")
        )
        log.note(
            f"ZeRO {recipe.engine.zero_stage}"
            + (f" by {deepspeed_config}" if deepspeed_config else "")
            + ", weights updated on the CPU" * (recipe.engine.offload != "none")
        )
        if left_out:
            log.note(f"{deepspeed_config}: without effect in this run: {', '.join(left_out)}")
        if unchecked:
            log.note(unchecked)
        if short := warmup_warning(total_steps, warmup_steps):
            log.note(f"optim: {short}")

    unmeasured: AllRanksError | None = None

    def measure() -> dict:
        """The task's figures of this step's weights; none where they cannot be measured."""
        nonlocal unmeasured
        try:
            figures = task.evaluate(step, watchdog.heartbeat)
        except AllRanksError as error:
            unmeasured = error
            return {}
        if log and figures:
            log.note(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        return figures

    def make_sure() -> None:
        """Write a checkpoint, and what the task shows of it."""
        state = {
            **identity,
            "stream": guard.offset + step * recipe.data.global_batch,
            "window": window.collect(),
            "guard": guard.state(),
            "unmeasured": unmeasured is not None,
            "recipe": recipe.model_dump(mode="json"),
            "versions": run_directory.versions(),
        }
        with watchdog.extended_timeout():
            raise_on_all_ranks(lambda: log.flush() if log else None)
            with preemption.writing():
                task.show(step)
            checkpoint.save(model, model_ema, checkpoints, step, state, recipe.train, dist_info)

    def on_device(value: float | torch.Tensor) -> torch.Tensor:
        """0-d. A number is filled in there: to copy it would make the host wait for the device."""
        if isinstance(value, torch.Tensor):
            return value.to(dist_info.device)
        return torch.full((), value, device=dist_info.device)

    def read(upto: int) -> BadSpan | None:
        """What the guard hears of the steps up to this one; the skipped are said."""
        known = len(guard.skips)
        bad_span = guard.read(upto)
        if log:
            for skip in guard.skips[known:]:
                log.note(skip.message())
        return bad_span

    # ---- Train
    throughput, profiler = ThroughputMeter(recipe, task.forward_flops(), dist_info), None
    if recipe.train.profile_steps and dist_info.rank == 0:
        first, last = recipe.train.profile_steps
        profiler = Profiler(run, first, min(last, total_steps), dist_info.device)
    if left.get("unmeasured") and task.evaluates(step, total_steps, num_samples):
        measure()
    throughput.start(step, loader)
    while step < total_steps and not unmeasured:
        rate = learning_rate(step, total_steps, warmup_steps, recipe.lr, recipe.optim.min_lr)
        engine.set_learning_rate(model, rate)
        module.set_training_progress(step / total_steps)
        parts: dict[str, torch.Tensor] = {}
        replaced = 0
        if profiler:
            profiler.begin(step + 1)
        for _ in range(accumulation):
            batch = preemption.next(loader)
            if preemption.reason:
                break
            replaced += batch.replaced
            with throughput.time_compute():
                output = model(*batch.inputs)
            model.backward(output.loss)
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                parts[name] = parts.get(name, 0.0) + value / accumulation
            if engine.is_gradient_accumulation_boundary(model):
                guard.observe_loss(parts["loss"])
            norm = engine.step(model, guard.should_skip)
            if trace:
                with preemption.writing():
                    trace.write(step, loader.keys(batch.locations), batch.images, batch.noise)
            watchdog.heartbeat()
        if preemption.reason:
            break
        step += 1
        if profiler:
            with preemption.writing():
                if traced := profiler.end(step):
                    log.note(f"profile: {traced}")
        # The ranks' mean is taken.
        skipped = guard.close(step, norm)
        if model_ema:
            model_ema.update(skipped)
        counts = {"grad_norm": norm, "skipped": skipped, "replaced": replaced * dist_info.world_size}
        window.add({**parts, **{name: on_device(value) for name, value in counts.items()}})

        # ---- Go back, where nothing else helps
        evaluates = task.evaluates(step, total_steps, num_samples)
        says = step % recipe.train.log_every == 0 or step == total_steps or evaluates
        saves = step % recipe.train.checkpoint_every == 0 or step == total_steps
        # A step late: without waiting for the device.
        bad_span = read(step if says or saves else step - 1)
        if bad_span:
            loader.close()
            reader.reopen()
            batch_size, every = recipe.data.global_batch, recipe.train.checkpoint_every
            with watchdog.extended_timeout():
                write_offending_samples(run, bad_span, loader, guard.offset, batch_size, dist_info)
                with preemption.writing():
                    if log:
                        log.stop(bad_span.last, bad_span.reason)
                        log.close()
                    if trace:
                        trace.close()
                found = rollback(run, bad_span, guard, batch_size, every, dist_info)
                step, window, guard, log, trace, loader = stand(found)
            saved_step = step
            throughput.start(step, loader)
            continue

        # ---- Say how it goes
        if says:
            means, speed = window.close(), throughput.close(step)
            figures = measure() if evaluates else {}
            line = {
                "step": step,
                "time": round(time.time(), 3),
                "epoch": (guard.offset + step * recipe.data.global_batch) / num_samples,
                "samples": step * recipe.data.global_batch,
                **means,
                **figures,
                **({"skips": [skip._asdict() for skip in guard.skips]} if guard.skips else {}),
                "lr": rate,
                **speed,
            }
            if log:
                with preemption.writing():
                    log.write(line)
            guard.skips.clear()
            if unmeasured:
                preemption.sync_write_errors()
                break
            throughput.start(step, loader)
        if log:
            log.advance(step)

        # ---- Make sure of it
        if saves:
            if not preemption.sync_write_errors():
                break
            window.collect()  # waits for the device, so before the clock stops
            with throughput.paused():
                make_sure()
            saved_step = step

    # Stopped early or not measured, not in trouble, and with nothing missing that belongs to the steps since.
    if step > saved_step and preemption.reason != WRITE_ERROR and not read(step):
        make_sure()
        saved_step = step

    # ---- Close
    with watchdog.extended_timeout():
        loader.close()
        reader.close()
        with preemption.writing():
            if trace:
                trace.close()
            if log:
                log.close()
        preemption.sync_write_errors()
    if log and not preemption.reason and not unmeasured:
        log.note(f"done: {step} steps, {step * recipe.data.global_batch} images; {run}")
    preemption.raise_reason(saved_step)
    if unmeasured:
        raise AllRanksError(
            f"{unmeasured}. Everything is saved at step {saved_step}; the same command measures it again"
        )
