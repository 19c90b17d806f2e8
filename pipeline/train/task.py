"""What a run trains: everything in which pre-training and fine-tuning differ.

Invariant: a task does not decide when or in what order the model is trained; that is the trainer's and the loader's
part. So every task resumes as docs/running.md says.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pipeline.data.dense_loader import DenseLoader
from pipeline.data.loader import Loader
from pipeline.data.placement import DenseTransform
from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.models.trainable_module import TrainableModule
from pipeline.recipe.training import TrainingRecipe
from pipeline.train.micro_batch import MicroBatchLimits
from pipeline.train.run_directory import RunDirectory

RecipeT = TypeVar("RecipeT", bound=TrainingRecipe)


class Task(ABC, Generic[RecipeT]):
    """A training task. Every rank calls every method, in this order: select_samples, build, setup, then the others."""

    recipe: RecipeT
    labeled: bool = False
    """Whether the module takes labels."""
    transform: DenseTransform | None = None
    """If set, the module takes the targets that this makes of the annotations. Set by `build` at the latest."""

    @property
    @abstractmethod
    def description(self) -> str:
        """A few words on what is trained, for the log."""

    def select_samples(self, reader: ShardReader) -> None:
        """Restrict the reader to the samples to train on (`ShardReader.filter_samples`).

        Raises:
            UserError: If the data cannot be used, or no sample is left.
        """

    def make_loader(self, reader: ShardReader, *arguments: Any) -> Loader:
        """Create the loader of the training data; the arguments are those of `Loader` up to `undecodable`."""
        deterministic = self.recipe.engine.deterministic
        if self.transform:
            return DenseLoader(reader, self.transform, *arguments, deterministic=deterministic)
        return Loader(reader, *arguments, labeled=self.labeled, deterministic=deterministic)

    @abstractmethod
    def build(self, reader: ShardReader) -> TrainableModule:
        """Create the module with its initial weights, on the CPU in fp32.

        Raises:
            UserError: If it cannot be trained on this data.
        """

    def num_parameters(self, reader: ShardReader) -> int:
        """Return the number of parameters. Raises UserError as `build`."""
        return sum(p.numel() for p in self.build(reader).parameters())

    @abstractmethod
    def forward_flops(self) -> float:
        """Return the FLOPs of one image's forward pass in a micro batch."""

    def micro_batch_limits(self, reader: ShardReader, world_size: int, available_gib: float) -> MicroBatchLimits:
        """Return the limits of `engine.micro_batch: auto`. A task that does not define them needs a number.

        Args:
            available_gib: Memory of each GPU.
        """
        raise UserError("engine.micro_batch: auto is not supported by this task; give a number of images")

    def setup(self, run: RunDirectory, reader: ShardReader, module: TrainableModule, dist_info: DistInfo) -> None:
        """Prepare evaluation and images, when the run directory is locked and the module on its device."""

    def save_images(self, step: int) -> None:
        """Write images of the present weights. Called before a checkpoint is written."""

    def should_evaluate(self, step: int, total_steps: int, num_samples: int) -> bool:
        """Return whether the weights after `step` are evaluated; a function of the arguments alone."""
        return False

    def evaluate(self, step: int, heartbeat: Callable[[], None]) -> dict:
        """Evaluate the present weights.

        Args:
            heartbeat: Call it regularly, for the watchdog.

        Returns:
            Columns for metrics.jsonl.

        Raises:
            AllRanksError: The run then saves a checkpoint, stops, and evaluates again when it resumes.
        """
        return {}
