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

from pipeline.data.failures import Failures
from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.errors import AgreedError
from pipeline.train import checkpoint, engine, run_directory, wandb_run
from pipeline.train.average import Average
from pipeline.train.distributed import agreed, find_world, leaving_together
from pipeline.train.engine_config import engine_config, unused
from pipeline.train.guard import Guard, Trouble
from pipeline.train.hardware import device_name
from pipeline.train.metrics import Log, Window
from pipeline.train.pace import Pace
from pipeline.train.profiler import Profiler
from pipeline.train.retreat import retreat, write_samples
from pipeline.train.schedule import learning_rate, warning
from pipeline.train.stopping import UNWRITTEN, Stopping
from pipeline.train.task import Task
from pipeline.train.trace import Trace, take_back
from pipeline.train.watchdog import Watchdog


def train(task: Task, data: Sequence[str], run: Path, deepspeed_config: Path | None = None) -> None:
    """Train on the shard sets `data`, or the recipe's own where that is empty, in the run directory `run`;
    continue where it stands.

    deepspeed_config: the user's file instead of one of ds_configs/. Every rank calls it. Raises UserError for
    what the user can mend, before anything is written, or with everything saved; StoppedEarly where a
    signal ended it before its time; Diverged where the guard gives up.
    """
    with ExitStack() as held, leaving_together():
        _train(task, data, run, deepspeed_config, held)


def _train(
    task: Task, data: Sequence[str], run: Path, deepspeed_config: Path | None, held: ExitStack
) -> None:
    """held: the lock and the watchdog, until the ranks have parted."""
    # ---- Who we are, and whether what is asked is possible
    recipe = task.recipe
    stopping = Stopping()
    world = find_world()
    accumulation = recipe.accumulation(world.size)
    config = engine_config(recipe, world.size, deepspeed_config)
    left_out = unused(deepspeed_config, recipe) if deepspeed_config else []
    wandb_run.check(recipe)
    run_directory.check(run, recipe)
    reader = ShardReader(recipe.sources(data), recipe.data)
    num_samples = reader.num_samples
    total_steps = recipe.total_steps(num_samples)
    warmup_steps = recipe.warmup_steps(num_samples)

    # ---- What is trained, with whom, and where
    torch.manual_seed(recipe.seed)
    learner = task.build(reader)
    engine.connect(recipe.engine.timeout_minutes)
    stopping.connect(recipe.engine.timeout_minutes)
    unchecked = agreed(lambda: reader.check_bytes(world.rank, world.size))
    agreed(lambda: engine.check_config(config))
    agreed(lambda: engine.check_precision(recipe))
    agreed(lambda: held.enter_context(run_directory.begun(run, recipe)) if world.rank == 0 else None)
    patience = 60 * recipe.engine.timeout_minutes
    watchdog = agreed(lambda: held.enter_context(closing(Watchdog(run, world.rank, patience))))

    # ---- Continue where the run directory stands
    checkpoints = run / "checkpoints"
    identity = {"data": reader.fingerprint, "world_size": world.size, "zero_stage": recipe.engine.zero_stage}
    threads = recipe.data.threads or world.cores
    failures = Failures(reader, recipe.data.max_replaced, run / "replaced", world.rank)

    def open_log(step: int, guard: Guard) -> Log:
        take_back(run, step)
        return Log(run, recipe, step, total_steps, guard.returns)

    def stand(found: Path | None) -> tuple[int, Window, Guard, Log | None, Trace | None, Loader]:
        """Everything as it was when the checkpoint was written; None: as it is at the beginning."""
        state = checkpoint.read_state(found) if found else {"step": 0, "window": None, "guard": None}
        step, window = state["step"], Window(state["window"])
        guard = Guard(recipe.guard, recipe.engine.precision, world.device, state["guard"])
        if found:
            engine.load(model, average, checkpoints, found.name)
        log = agreed(lambda: open_log(step, guard) if world.rank == 0 else None)
        trace = agreed(lambda: Trace(run, world.rank) if recipe.data.trace else None)
        place = world.device, world.rank, world.size, step
        loader = Loader(
            reader, recipe, learner.noise_size, *place, threads, guard.offset, failures, task.labelled
        )
        return step, window, guard, log, trace, loader

    with watchdog.patient():
        model = engine.build_engine(recipe, learner, config, world.device)
        decay = recipe.train.ema_decay
        average = Average(model, decay) if decay else None
        newest = checkpoint.newest_whole(checkpoints, world.rank, world.size)
        left = checkpoint.read_state(newest) if newest else {}
        if newest:
            run_directory.check_continuation(newest, left, identity)
        step, window, guard, log, trace, loader = stand(newest)
        saved_step = step
        agreed(lambda: checkpoint.sweep(checkpoints, step) if log else None)
        device = device_name(world.device)
        start = {"step": step, "world_size": world.size, "device": device, "deepspeed": config}
        described = run, recipe, reader.described()
        agreed(lambda: run_directory.describe(*described, **start, before=log.found) if log else None)
        task.begin(run, reader, learner, world)
    if log:
        log.note(
            f"{task.title}: {num_samples} images, {total_steps} steps of "
            f"{recipe.data.global_batch} = {world.size} ranks x {accumulation} x {recipe.engine.micro_batch} "
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
        if short := warning(total_steps, warmup_steps):
            log.note(f"optim: {short}")

    unmeasured: AgreedError | None = None

    def measure() -> dict:
        """The task's figures of this step's weights; none where they cannot be measured."""
        nonlocal unmeasured
        try:
            figures = task.evaluate(step, watchdog.alive)
        except AgreedError as error:
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
        with watchdog.patient():
            agreed(lambda: log.flush() if log else None)
            with stopping.writing():
                task.show(step)
            checkpoint.save(model, average, checkpoints, step, state, recipe.train, world)

    def on_device(value: float | torch.Tensor) -> torch.Tensor:
        """0-d. A number is filled in there: to copy it would make the host wait for the device."""
        if isinstance(value, torch.Tensor):
            return value.to(world.device)
        return torch.full((), value, device=world.device)

    def read(upto: int) -> Trouble | None:
        """What the guard hears of the steps up to this one; the skipped are said."""
        known = len(guard.skips)
        trouble = guard.read(upto)
        if log:
            for skip in guard.skips[known:]:
                log.note(skip.sentence())
        return trouble

    # ---- Train
    pace, profiler = Pace(recipe, task.forward_flops(), world), None
    if recipe.train.profile_steps and world.rank == 0:
        first, last = recipe.train.profile_steps
        profiler = Profiler(run, first, min(last, total_steps), world.device)
    if left.get("unmeasured") and task.evaluates(step, total_steps, num_samples):
        measure()
    pace.start(step, loader)
    while step < total_steps and not unmeasured:
        rate = learning_rate(step, total_steps, warmup_steps, recipe.lr, recipe.optim.min_lr)
        engine.set_learning_rate(model, rate)
        learner.set_progress(step / total_steps)
        parts: dict[str, torch.Tensor] = {}
        replaced = 0
        if profiler:
            profiler.begin(step + 1)
        for _ in range(accumulation):
            batch = stopping.next(loader)
            if stopping.reason:
                break
            replaced += batch.replaced
            with pace.alone():
                output = model(*batch.inputs)
            model.backward(output.loss)
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                parts[name] = parts.get(name, 0.0) + value / accumulation
            if engine.at_boundary(model):
                guard.hear(parts["loss"])
            norm = engine.step(model, guard.verdict)
            if trace:
                with stopping.writing():
                    trace.write(step, loader.keys(batch.located), batch.images, batch.noise)
            watchdog.alive()
        if stopping.reason:
            break
        step += 1
        if profiler:
            with stopping.writing():
                if traced := profiler.end(step):
                    log.note(f"profile: {traced}")
        # The ranks' mean is taken.
        skipped = guard.close(step, norm)
        if average:
            average.update(skipped)
        counts = {"grad_norm": norm, "skipped": skipped, "replaced": replaced * world.size}
        window.add({**parts, **{name: on_device(value) for name, value in counts.items()}})

        # ---- Go back, where nothing else helps
        evaluates = task.evaluates(step, total_steps, num_samples)
        says = step % recipe.train.log_every == 0 or step == total_steps or evaluates
        saves = step % recipe.train.checkpoint_every == 0 or step == total_steps
        # A step late: without waiting for the device.
        trouble = read(step if says or saves else step - 1)
        if trouble:
            loader.close()
            reader.reopen()
            batch_size, every = recipe.data.global_batch, recipe.train.checkpoint_every
            with watchdog.patient():
                write_samples(run, trouble, loader, guard.offset, batch_size, world)
                with stopping.writing():
                    if log:
                        log.stop(trouble.last, trouble.reason)
                        log.close()
                    if trace:
                        trace.close()
                found = retreat(run, trouble, guard, batch_size, every, world)
                step, window, guard, log, trace, loader = stand(found)
            saved_step = step
            pace.start(step, loader)
            continue

        # ---- Say how it goes
        if says:
            means, speed = window.close(), pace.close(step)
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
                with stopping.writing():
                    log.write(line)
            guard.skips.clear()
            if unmeasured:
                stopping.settle()
                break
            pace.start(step, loader)
        if log:
            log.advance(step)

        # ---- Make sure of it
        if saves:
            if not stopping.settle():
                break
            window.collect()  # waits for the device, so before the clock stops
            with pace.paused():
                make_sure()
            saved_step = step

    # Stopped early or not measured, not in trouble, and with nothing missing that belongs to the steps since.
    if step > saved_step and stopping.reason != UNWRITTEN and not read(step):
        make_sure()
        saved_step = step

    # ---- Close
    with watchdog.patient():
        loader.close()
        reader.close()
        with stopping.writing():
            if trace:
                trace.close()
            if log:
                log.close()
        stopping.settle()
    if log and not stopping.reason and not unmeasured:
        log.note(f"done: {step} steps, {step * recipe.data.global_batch} images; {run}")
    stopping.raise_reason(saved_step)
    if unmeasured:
        raise AgreedError(
            f"{unmeasured}. Everything is saved at step {saved_step}; the same command measures it again"
        )
