"""The trainer of pre-training and fine-tuning: a task, trained with DeepSpeed.

Invariant: a run that is killed anywhere and resumed with the same command ends with the same weights and the same
logged losses: bit-identical on the same world size and ZeRO stage, otherwise up to the order of summation.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.data.loader import Batch, Loader
from pipeline.data.reader import ShardReader
from pipeline.data.undecodable import UndecodableSamples
from pipeline.distributed.collectives import all_gather_object, broadcast_object, raise_on_all_ranks
from pipeline.distributed.hardware import device_name, enable_determinism, total_memory_gib
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError
from pipeline.recipe.sections import is_auto
from pipeline.recipe.training import TrainingRecipe, choose_micro_batch
from pipeline.train import engine
from pipeline.train.ema import ModelEma
from pipeline.train.engine_config import engine_config, ignored_keys
from pipeline.train.guard import BadSpan, Guard
from pipeline.train.lr_schedule import learning_rate, warmup_warning
from pipeline.train.micro_batch import resolve_micro_batch
from pipeline.train.profiler import Profiler
from pipeline.train.rollback import rollback, write_bad_samples
from pipeline.train.run_directory import RunDirectory
from pipeline.train.sample_trace import SampleTrace, truncate_after
from pipeline.train.task import Task
from pipeline.train.throughput import ThroughputMeter
from pipeline.train.train_loop import TrainLoop
from pipeline.train.wandb_logger import check_installed

logger = logging.getLogger(__name__)


class Trainer(TrainLoop[TrainingRecipe, Loader]):
    """Trains a task on shard sets; resumes the run directory from its newest checkpoint.

    Args:
        task: What is trained.
        data: Paths or URLs of shard sets; empty to use the recipe's data.sources.
        run: The run directory.
        deepspeed_config: A DeepSpeed file to use instead of one of ds_configs/.
    """

    def __init__(self, task: Task[Any], data: Sequence[str], run: RunDirectory, deepspeed_config: Path | None = None):
        super().__init__(task.recipe, run)
        self.task, self.data, self.deepspeed_config = task, data, deepspeed_config
        self.guard: Guard
        self.model_ema: ModelEma | None = None
        self.trace: SampleTrace | None = None
        self.profiler: Profiler | None = None
        self._lr = 0.0
        self._is_compiled = not task.recipe.engine.compile

    def connect(self, dist_info: DistInfo) -> None:
        engine.init_distributed(self.recipe.engine.timeout_minutes)

    def prepare(self) -> None:
        dist_info = self.session.dist_info
        if self.recipe.engine.deterministic:
            enable_determinism()
        raise_on_all_ranks(self._prepare)
        if is_auto(self.recipe.engine.micro_batch):
            self._resolve_micro_batch()
            raise_on_all_ranks(self._configure)
        self.unchecked = raise_on_all_ranks(lambda: self.reader.verify_checksums(dist_info.rank, dist_info.world_size))
        raise_on_all_ranks(lambda: engine.check_config(self.config))
        raise_on_all_ranks(lambda: engine.check_precision(self.recipe))

    def _prepare(self) -> None:
        recipe = self.recipe
        if is_auto(recipe.engine.micro_batch):
            recipe.images_per_rank(self.session.dist_info.world_size)
        else:
            self._configure()
        check_installed(recipe)
        self.run.check(recipe)
        self.reader = ShardReader(recipe.resolve_sources(self.data), recipe.data)
        self.task.select_samples(self.reader)
        self.num_samples, self.fingerprint = self.reader.num_samples, self.reader.fingerprint
        self.total_steps = recipe.total_steps(self.num_samples)
        self.warmup_steps = recipe.warmup_steps(self.num_samples)
        torch.manual_seed(recipe.seed)
        self.module = self.task.build(self.reader)

    def _resolve_micro_batch(self) -> None:
        """Replace auto by the number that rank 0 chooses for the smallest GPU. Collective."""
        world_size = self.session.dist_info.world_size
        memory = [gib for gib in all_gather_object(total_memory_gib(self.session.dist_info.device)) if gib is not None]

        def choose() -> TrainingRecipe:
            return resolve_micro_batch(
                self.recipe,
                self.run,
                world_size,
                min(memory, default=None),
                lambda gib: self.task.micro_batch_limits(self.reader, world_size, gib),
            )

        chosen = raise_on_all_ranks(lambda: choose().engine.micro_batch if self.session.is_rank_0 else 0)
        self.recipe = self.task.recipe = self.recipe.with_micro_batch(broadcast_object(chosen))

    def _configure(self) -> None:
        world_size = self.session.dist_info.world_size
        self.accumulation_steps = self.recipe.gradient_accumulation_steps(world_size)
        self.config = engine_config(self.recipe, world_size, self.deepspeed_config)

    def build(self) -> None:
        recipe, dist_info = self.recipe, self.session.dist_info
        self.engine = engine.build_engine(recipe, self.module, self.config, dist_info.device)
        if recipe.train.ema_decay:
            self.model_ema = ModelEma(self.engine, recipe.train.ema_decay)
        self.undecodable = UndecodableSamples(
            self.reader, recipe.data.max_undecodable, self.run.undecodable, dist_info.rank
        )
        self.throughput = ThroughputMeter(recipe, self.task.forward_flops(), dist_info)
        if recipe.train.profile_steps and self.session.is_rank_0:
            first, last = recipe.train.profile_steps
            self.profiler = Profiler(self.run, first, min(last, self.total_steps), dist_info.device)

    def load(self, path: Path | None, state: dict) -> None:
        recipe, dist_info, step = self.recipe, self.session.dist_info, self.state.step
        self.guard = Guard(recipe.guard, recipe.engine.precision, dist_info.device, state.get("guard"))
        if path:
            engine.load(self.engine, self.model_ema, path)
        self.session.on_rank_0(lambda: truncate_after(self.run, step))
        if recipe.data.trace:
            self.trace = raise_on_all_ranks(lambda: SampleTrace(self.run, dist_info.rank))
        self.loader = self.task.make_loader(
            self.reader,
            recipe,
            self.module.noise_size,
            dist_info.device,
            dist_info.rank,
            dist_info.world_size,
            step,
            recipe.data.decode_threads or dist_info.num_cpus,
            self.guard.offset,
            self.undecodable,
        )

    def on_train_start(self) -> None:
        self.task.setup(self.run, self.reader, self.module, self.session.dist_info)
        recipe, dist_info = self.recipe, self.session.dist_info
        resumed = f", resumed after step {self.state.step}" if self.state.step else ""
        logger.info(
            f"{self.task.description}: {self.num_samples} images, {self.total_steps} steps of "
            f"{recipe.data.global_batch} = {dist_info.world_size} ranks x {self.accumulation_steps} x "
            f"{recipe.engine.micro_batch} on {device_name(dist_info.device)}, {recipe.engine.precision}{resumed}"
        )
        source = f" from {self.deepspeed_config}" if self.deepspeed_config else ""
        offload = ", optimizer on the CPU" if recipe.engine.offload != "none" else ""
        logger.info(f"ZeRO {recipe.engine.zero_stage}{source}{offload}")
        if self.deepspeed_config and (keys := ignored_keys(self.deepspeed_config, recipe)):
            logger.warning(f"{self.deepspeed_config}: without effect in this run: {', '.join(keys)}")
        if self.unchecked:
            logger.warning(self.unchecked)
        if warning := warmup_warning(self.total_steps, self.warmup_steps):
            logger.warning(f"optim: {warning}")

    def train_step(self) -> bool:
        step, preemption = self.state.step, self.session.preemption
        self._lr = self.learning_rate_at(step, self.total_steps)
        engine.set_learning_rate(self.engine, self._lr)
        self.module.set_training_progress(step / self.total_steps)
        if self.profiler:
            self.profiler.start_step(step + 1)
        metrics: dict[str, torch.Tensor] = {}
        grad_norm, undecodable = 0.0, 0
        for _ in range(self.accumulation_steps):
            batch = preemption.next_batch(self.loader)
            if batch is None:
                return False
            undecodable += batch.replaced
            with self._compilation_timeout():
                grad_norm = self._train_micro_batch(batch, metrics)
        self.state.step += 1
        self._end_profile()
        skipped = self.guard.record_step(self.state.step, grad_norm)
        self.module.update_buffers(skipped)
        if self.model_ema:
            self.model_ema.update(skipped)
        # Metrics are averaged over ranks; undecodable samples are summed.
        undecodable *= self.session.dist_info.world_size
        counts = {"grad_norm": grad_norm, "skipped": skipped, "undecodable": undecodable}
        self.state.metrics.add(metrics | {name: self._on_device(value) for name, value in counts.items()})
        return True

    def _train_micro_batch(self, batch: Batch, metrics: dict[str, torch.Tensor]) -> float | torch.Tensor:
        """Train a micro batch and add its metrics. Returns the gradient norm, 0.0 before the last micro batch."""
        with self.throughput.time_compute():
            output = self.engine(*batch.inputs)
        self.engine.backward(output.loss)
        for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
            metrics[name] = metrics.get(name, 0.0) + value / self.accumulation_steps
        if engine.is_gradient_accumulation_boundary(self.engine):
            self.guard.observe_loss(metrics["loss"])
        grad_norm = engine.step(self.engine, self.guard.should_skip)
        if self.trace:
            with self.session.preemption.catch_write_errors():
                keys = self.loader.keys(batch.locations)
                self.trace.write(self.state.step, keys, batch.images, batch.noise)
        self.session.watchdog.heartbeat()
        return grad_norm

    @contextmanager
    def _compilation_timeout(self) -> Iterator[None]:
        """Extend the watchdog's timeout for the first micro batch with engine.compile."""
        if self._is_compiled:
            yield
            return
        with self.session.watchdog.extended_timeout():
            yield
        self._is_compiled = True

    def out_of_memory_fix(self) -> str:
        micro_batch, unit = self.recipe.engine.micro_batch, self.recipe.micro_batch_unit
        if is_auto(micro_batch):  # not even the model is on the GPU
            return "end other programs on it"
        smaller = choose_micro_batch(micro_batch, unit, micro_batch / 2)
        options = [f"--set engine.micro_batch={smaller}"] * (smaller < micro_batch)
        if not self.recipe.engine.activation_checkpointing:
            options.append("--set engine.activation_checkpointing=true")
        return f"use {' or '.join(options) or 'a larger engine.zero_stage'} (results stay the same)"

    def check_divergence(self, up_to_step: int | None = None) -> BadSpan | None:
        if up_to_step is None:
            # Poll the previous step, so that the host never blocks on the GPU. Before a line or a checkpoint is
            # written, poll the present one.
            up_to_step = self.state.step - (not (self.should_log() or self.should_save()))
        known = len(self.guard.skipped_steps)
        bad_span = self.guard.check(up_to_step)
        for skipped in self.guard.skipped_steps[known:]:
            logger.warning(skipped.message())
        return bad_span

    def rollback(self, bad_span: BadSpan) -> None:
        recipe, dist_info = self.recipe, self.session.dist_info
        self.loader.close()
        self.reader.reopen()
        with self.session.watchdog.extended_timeout():
            write_bad_samples(
                self.run, bad_span, self.loader, self.guard.offset, recipe.data.global_batch, dist_info.rank
            )
            with self.session.preemption.catch_write_errors():
                if self.metrics_logger:
                    self.metrics_logger.write_stop(bad_span.last_step, bad_span.reason)
                    self.metrics_logger.close()
                if self.trace:
                    self.trace.close()
            path = rollback(
                self.run, bad_span, self.guard, recipe.data.global_batch, recipe.train.checkpoint_every, dist_info
            )
            self.restore(path)
        self.throughput.start(self.state.step, self.loader)

    def should_evaluate(self) -> bool:
        return self.task.should_evaluate(self.state.step, self.total_steps, self.num_samples)

    def evaluate(self) -> dict:
        """Evaluate the task. If that fails, the run saves a checkpoint, stops, and evaluates again when it resumes."""
        try:
            with engine.without_compilation(self.recipe):
                metrics = self.task.evaluate(self.state.step, self.session.watchdog.heartbeat)
        except AllRanksError as error:
            self.eval_error = error
            return {}
        if metrics:
            values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not isinstance(value, dict))
            logger.info(f"step {self.state.step}: {values}")
        return metrics

    def extra_metrics(self, means: dict) -> dict:
        skipped = [step._asdict() for step in self.guard.skipped_steps]
        self.guard.skipped_steps.clear()
        return {"skipped_steps": skipped} if skipped else {}

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        peak, optim = self.recipe.peak_lr, self.recipe.optim
        return learning_rate(step, total_steps, self.warmup_steps, peak, optim.min_lr, optim.decay, optim.decay_steps)

    def current_lr(self) -> float:
        return self._lr

    @property
    def data_offset(self) -> int:
        return self.guard.offset

    def rollbacks(self) -> list[dict]:
        return self.guard.rollbacks

    def metadata(self) -> dict:
        return {"data": self.reader.source_info(), "deepspeed": self.config}

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "zero_stage": self.recipe.engine.zero_stage,
            "stream": self.guard.offset + self.state.step * self.recipe.data.global_batch,
            "guard": self.guard.state_dict(),
        }

    def save_images(self) -> None:
        with engine.without_compilation(self.recipe):
            self.task.save_images(self.state.step)

    def write_part(self, directory: Path) -> None:
        engine.save(self.engine, self.model_ema, directory)

    def write_shared(self, directory: Path) -> None:
        engine.consolidate_fp32_weights(self.engine, self.model_ema, directory)

    def close(self) -> None:
        self.loader.close()
        self.reader.close()
        with self.session.preemption.catch_write_errors():
            if self.trace:
                self.trace.close()

    def _end_profile(self) -> None:
        if self.profiler:
            with self.session.preemption.catch_write_errors():
                if path := self.profiler.end_step(self.state.step):
                    logger.info(f"profile: {path}")

    def _on_device(self, value: float | torch.Tensor) -> torch.Tensor:
        """Return a 0-d tensor on the device. A number is filled in there: copying it would make the host wait."""
        device = self.session.dist_info.device
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return torch.full((), value, device=device)
