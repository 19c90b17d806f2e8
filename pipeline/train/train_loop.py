"""The training loop with checkpoints, metrics, preemption and resume.

`Trainer` trains a task with DeepSpeed by it, and the linear probe trains its heads by it.

Invariant: every decision of the loop depends only on values that are equal on all ranks, so all ranks take the same
branches. What is trained is a function of recipe and data: a run that is killed anywhere and resumed ends with the
same weights and the same logged losses.
"""

import logging
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch

from pipeline.distributed.hardware import device_name
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError
from pipeline.recipe.linear_probe import ProbeRecipe
from pipeline.recipe.sections import TrainSection
from pipeline.recipe.training import TrainingRecipe
from pipeline.train import checkpoint
from pipeline.train.guard import BadSpan
from pipeline.train.metric_accumulator import MetricAccumulator
from pipeline.train.metrics import MetricsLogger
from pipeline.train.run_directory import RunDirectory, package_versions
from pipeline.train.run_session import RunSession
from pipeline.train.throughput import ThroughputMeter, TimedLoader

logger = logging.getLogger(__name__)
RecipeT = TypeVar("RecipeT", bound=TrainingRecipe | ProbeRecipe)
LoaderT = TypeVar("LoaderT", bound=TimedLoader)


@dataclass
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Completed steps."""
    saved_step: int = 0
    """Step of the newest checkpoint."""
    metrics: MetricAccumulator = field(default_factory=MetricAccumulator)
    """Metrics since the last logged line."""


class TrainLoop(ABC, Generic[RecipeT, LoaderT]):
    """Trains from the newest checkpoint of a run directory to the last step.

    Attributes that `prepare` sets: `total_steps`, `num_samples` and `fingerprint` of the training data. `build` sets
    `throughput`; `load` sets `loader`.
    """

    session: RunSession
    throughput: ThroughputMeter
    loader: LoaderT
    total_steps: int
    num_samples: int
    fingerprint: str

    def __init__(self, recipe: RecipeT, run: RunDirectory):
        self.recipe, self.run, self.state = recipe, run, TrainState()
        self.eval_error: AllRanksError | None = None
        self.metrics_logger: MetricsLogger | None = None
        """On rank 0 only."""

    def train(self) -> None:
        """Train until the last step, a stop request, or a failed evaluation. Every rank calls it.

        Raises:
            UserError: If the user has to fix something. Nothing was written, or everything is saved, except that a GPU
                out of memory loses the steps since the last checkpoint.
            StoppedEarly: After a signal or a transient failure, with everything saved.
            Diverged: If the guard stops the run.
        """
        with RunSession(self.run, self.recipe.engine.timeout_minutes, self.connect) as self.session:
            try:
                self.prepare()
                self.session.acquire_run_dir(self.recipe)
                self.resume()
                while self.should_continue():
                    if not self.train_step():
                        break
                    if bad_span := self.check_divergence():
                        self.rollback(bad_span)
                        continue
                    if self.should_log():
                        self.log_metrics()
                    if self.metrics_logger:
                        self.metrics_logger.advance(self.state.step)
                    if self.should_save() and self.session.preemption.sync_write_errors():
                        self.save_checkpoint()
                self.finish()
            except torch.OutOfMemoryError as error:  # the other ranks may be waiting for this one
                raise AllRanksError(self.session.abort.announce(self.out_of_memory_message())) from error

    # ---- Defined by subclasses

    @abstractmethod
    def connect(self, dist_info: DistInfo) -> None:
        """Create the process group."""

    @abstractmethod
    def prepare(self) -> None:
        """Read the data and check that the run can start. Writes nothing. Collective."""

    @abstractmethod
    def build(self) -> None:
        """Create the model on its device, as at step 0. Collective."""

    @abstractmethod
    def load(self, path: Path | None, state: dict) -> None:
        """Restore the weights of a checkpoint (None: step 0), and create `loader` at `self.state.step`. Collective.

        Args:
            state: The checkpoint's state.json; empty at step 0.
        """

    @abstractmethod
    def train_step(self) -> bool:
        """Train one step, and increment `self.state.step`.

        Returns:
            False if a stop request came before the step's weights changed.
        """

    @abstractmethod
    def write_part(self, directory: Path) -> None:
        """Write this rank's files of a checkpoint."""

    @abstractmethod
    def write_shared(self, directory: Path) -> None:
        """Write the other files of a checkpoint. Called on rank 0, after all parts."""

    @abstractmethod
    def close(self) -> None:
        """Close loader and reader."""

    def state_dict(self) -> dict:
        """Return what state.json needs besides the weights. Collective; waits for the device."""
        return {
            "data": self.fingerprint,
            "world_size": self.session.dist_info.world_size,
            "metrics": self.state.metrics.state_dict(),
            "eval_failed": self.eval_error is not None,
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": package_versions(),
        }

    def metadata(self) -> dict:
        """Return what environment.json needs: `data`, the description of the shard sets, and more."""
        return {}

    def rollbacks(self) -> list[dict]:
        """Return the rollback events that metrics.jsonl must have."""
        return []

    def extra_metrics(self, means: dict) -> dict:
        """Return more columns for a logged line, given the metrics' means. Called once per line."""
        return {}

    @abstractmethod
    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate for the step after `step` completed ones of a run of `total_steps`."""

    def current_lr(self) -> float:
        """Return the learning rate of the last step."""
        raise NotImplementedError

    @property
    def data_offset(self) -> int:
        """Stream positions that rollbacks skipped."""
        return 0

    def out_of_memory_message(self) -> str:
        """Describe the error that this rank's GPU is out of memory, with the fix."""
        saved = f"saved at step {self.state.saved_step}" if self.state.saved_step else "nothing was saved yet"
        return (
            f"engine.micro_batch: {self.recipe.engine.micro_batch} needs more memory than the GPU of rank "
            f"{self.session.dist_info.rank} has; {self.out_of_memory_fix()}; {saved}"
        )

    def out_of_memory_fix(self) -> str:
        return "reduce it"

    def should_evaluate(self) -> bool:
        return False

    def evaluate(self) -> dict:
        """Evaluate the present weights. Returns columns for the logged line. Collective."""
        return {}

    def check_divergence(self, up_to_step: int | None = None) -> BadSpan | None:
        """Return the skipped steps if there are too many consecutive ones up to `up_to_step`."""
        return None

    def rollback(self, bad_span: BadSpan) -> None:
        """Continue from an earlier checkpoint with later data. Collective."""
        raise NotImplementedError

    def save_images(self) -> None:
        """Write images of the present weights. Collective."""

    def on_train_start(self) -> None:
        """Do what is left before the first step, when everything is restored. Collective."""

    def on_train_end(self) -> None:
        """Do what is left after the last step. Called if the run reached it; collective."""

    # ---- The loop's parts

    def resume(self) -> None:
        """Build the model, restore the newest checkpoint, and write the metadata of this start. Collective."""
        dist_info = self.session.dist_info
        with self.session.watchdog.extended_timeout():
            self.build()
            path = checkpoint.latest_valid_checkpoint(self.run.checkpoints, dist_info.rank, dist_info.world_size)
            state = checkpoint.read_state(path) if path else {}
            if path and state["data"] != self.fingerprint:
                raise AllRanksError(f"{path}: was trained on another shard set than --data; use that, or a new --run")
            self.restore(path)
            self.session.on_rank_0(lambda: checkpoint.remove_partial(self.run.checkpoints, self.state.step))
            self.session.on_rank_0(self._write_metadata)
            self.on_train_start()
            if state:
                self._log_changed_length(state["recipe"]["train"])
        if state.get("eval_failed") and self.should_evaluate():
            self.evaluate()
        self.throughput.start(self.state.step, self.loader)

    def restore(self, path: Path | None) -> None:
        """Set everything to a checkpoint's state, or to step 0 if `path` is None. Collective."""
        state = checkpoint.read_state(path) if path else {}
        step = state.get("step", 0)
        self.state = TrainState(step, step, MetricAccumulator(state.get("metrics")))
        self.load(path, state)
        self.session.on_rank_0(self._open_metrics)

    def should_continue(self) -> bool:
        return (
            self.state.step < self.total_steps and not self.session.preemption.stop_reason and self.eval_error is None
        )

    def should_log(self) -> bool:
        step = self.state.step
        return step % self.recipe.train.log_every == 0 or step == self.total_steps or self.should_evaluate()

    def should_save(self) -> bool:
        step = self.state.step
        return step % self.recipe.train.checkpoint_every == 0 or step == self.total_steps

    def log_metrics(self) -> None:
        """Write a line of metrics.jsonl, with an evaluation if one is due. Collective."""
        step, batch = self.state.step, self.recipe.data.global_batch
        means, throughput = self.state.metrics.compute_and_reset(), self.throughput.compute(step)
        line = {
            "step": step,
            "time": round(time.time(), 3),
            "epoch": (self.data_offset + step * batch) / self.num_samples,
            "samples": step * batch,
            **means,
            **(self.evaluate() if self.should_evaluate() else {}),
            **self.extra_metrics(means),
            "lr": self.current_lr(),
            **throughput,
        }
        if self.metrics_logger:
            with self.session.preemption.catch_write_errors():
                self.metrics_logger.write(line)
        self.throughput.start(step, self.loader)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the present step. Collective; only after write errors were synchronized."""
        step, state = self.state.step, self.state_dict()
        with self.throughput.paused(), self.session.watchdog.extended_timeout():
            self.session.on_rank_0(self._flush_metrics)
            with self.session.preemption.catch_write_errors():
                self.save_images()
            checkpoint.save(
                self.write_part,
                self.write_shared,
                self.run.checkpoints,
                step,
                state,
                self.recipe.train,
                self.session.dist_info,
            )
        self.state.saved_step = step

    def finish(self) -> None:
        """Save and close. Raises the error that ended the run, if there is one. Collective."""
        preemption = self.session.preemption
        preemption.discard_ahead()
        # Final checkpoint after an early stop or a failed evaluation, unless a write failed or training diverged.
        if (
            self.state.step > self.state.saved_step
            and preemption.sync_write_errors()
            and not self.check_divergence(self.state.step)
        ):
            self.save_checkpoint()
        done = not preemption.stop_reason and self.eval_error is None
        if done:
            self.on_train_end()
        with self.session.watchdog.extended_timeout():
            self.close()
            with preemption.catch_write_errors():
                if self.metrics_logger:
                    self.metrics_logger.close()
            preemption.sync_write_errors()
        if done and not preemption.stop_reason:
            step = self.state.step
            logger.info(f"done: {step} steps, {step * self.recipe.data.global_batch} images; {self.run}")
        preemption.raise_stop_reason(self.state.saved_step)
        if self.eval_error:
            raise AllRanksError(
                f"{self.eval_error}; saved at step {self.state.saved_step}; the same command evaluates again"
            ) from self.eval_error

    def _log_changed_length(self, train: dict) -> None:
        """Log how the learning rate changes if the run is longer or shorter than before; `train` is its old section."""
        before = TrainSection(steps=train["steps"], epochs=train["epochs"])
        steps = before.total_steps(self.num_samples, self.recipe.data.global_batch)
        if steps == self.total_steps:
            return
        step = self.state.step
        old, new = (self.learning_rate_at(step, total) for total in (steps, self.total_steps))
        logger.warning(
            f"train.steps, train.epochs: the run has {self.total_steps} steps instead of {steps}, so the learning rate "
            f"after step {step} is {new:.3g} instead of {old:.3g} (docs/running.md, Training longer)"
        )

    def _open_metrics(self) -> None:
        self.metrics_logger = MetricsLogger(self.run, self.recipe, self.state.step, self.total_steps, self.rollbacks())

    def _flush_metrics(self) -> None:
        assert self.metrics_logger
        self.metrics_logger.flush()

    def _write_metadata(self) -> None:
        assert self.metrics_logger
        self.run.write_metadata(
            self.recipe,
            **self.metadata(),
            step=self.state.step,
            world_size=self.session.dist_info.world_size,
            device=device_name(self.session.dist_info.device),
            before=self.metrics_logger.last_line,
        )
