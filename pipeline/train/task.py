"""What a run trains, as the loop sees it: all that pre-training and fine-tuning differ in.

Invariant: a task decides nothing about when or in what order the model learns; that is the loop's and the
loader's. So whatever is trained, a run continues as docs/running.md says.
"""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.models.module import TrainableModule
from pipeline.recipe.base import TrainingRecipe


class Task(Protocol):
    """Every rank calls every method."""

    recipe: TrainingRecipe
    labelled: bool = False
    """Whether the learner takes labels."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What is trained, in a few words."""

    @abstractmethod
    def build(self, reader: ShardReader) -> TrainableModule:
        """The module as it is at the beginning, on the CPU in float32. UserError where it can't be trained on
        this data."""

    def parameters(self, reader: ShardReader) -> int:
        """How many numbers are trained. UserError as `build`."""
        return sum(p.numel() for p in self.build(reader).parameters())

    @abstractmethod
    def forward_flops(self) -> float:
        """Floating-point operations of an image's share of a micro batch's forward pass, after `build`."""

    def begin(self, run: Path, reader: ShardReader, module: TrainableModule, dist_info: DistInfo) -> None:
        """The run begins or continues in the directory `run`; `learner` is on its device."""

    def show(self, step: int) -> None:
        """Write what is to be seen of a checkpoint's weights, just before it is written."""

    def evaluates(self, step: int, total_steps: int, num_samples: int) -> bool:
        """Whether the weights of this step are measured; a function of the arguments alone."""
        return False

    def evaluate(self, step: int, heartbeat: Callable[[], None]) -> dict:
        """Measure the weights: figures for the line of metrics.jsonl. alive: called now and then.

        Where it raises AgreedError, the run saves everything, stops, and measures again when it continues.
        """
        return {}
