"""What the tasks of `finetune` have in common: initial weights, validation set and results.

    RUN/results.json     last evaluation: the task's metrics, and what was evaluated
    RUN/weights.json     initial weights: see `run_metadata`

Invariant: a result counts each validation sample exactly once, on any world size, or is not reported.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import nn

from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import broadcast_object, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.datasets import verify_checksums
from pipeline.evals.frozen_encoder import module_digest
from pipeline.io.atomic import read_json, write_json
from pipeline.models.trainable_module import TrainableModule
from pipeline.recipe.finetune import FinetuneRecipe
from pipeline.recipe.sections import VIT_SIZES
from pipeline.tasks.run_metadata import InitialWeights, load_or_create
from pipeline.train import checkpoint
from pipeline.train.run_directory import RunDirectory
from pipeline.train.task import Task
from pipeline.weights.encoder import ImageEncoder

RecipeT = TypeVar("RecipeT", bound=FinetuneRecipe)
ModuleT = TypeVar("ModuleT", bound=TrainableModule)
FULL_SET = {"sources": None, "subset": 1.0, "subset_by_class": False, "holdout": 0.0}
"""Keys of `data` with which the whole validation set is read."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Results(NamedTuple):
    """The result of an evaluation, equal on all ranks."""

    values: dict[str, Any]
    """For results.json."""
    metrics: dict[str, float]
    """Columns for metrics.jsonl."""


class Trained(NamedTuple, Generic[ModuleT]):
    """A trained model, in fp32 on the CPU."""

    module: ModuleT
    step: int
    initial: InitialWeights


class FinetuneTask(Task[RecipeT], Generic[RecipeT, ModuleT]):
    """Training with annotations, from the weights of an encoder, and evaluation on a validation set.

    Args:
        recipe: Recipe with `weights` set.
        val: Shard set to evaluate on, directory or URL; None for predictions.
    """

    module: ModuleT
    classes: tuple[str, ...]
    """The classes, in the order of the module's outputs."""
    class_names: tuple[str, ...]
    """Readable names of the classes, or empty."""
    saves_predictions = False
    """Whether each evaluation during training writes to RUN/predictions."""

    def __init__(self, recipe: RecipeT, val: str | None) -> None:
        self.recipe, self._val_path = recipe, val

    # ---- Defined by subclasses

    @property
    @abstractmethod
    def expected_encoder(self) -> tuple[str, str | None]:
        """Return the recipe key that names the encoder size that the settings are for, and its value."""

    @abstractmethod
    def check_annotated(self, option: str, reader: ShardReader) -> None:
        """Raise UserError, naming the option, if a set lacks the task's annotations."""

    def select_val_samples(self, reader: ShardReader) -> None:
        """Leave out samples of the validation set that do not belong to it; see `ShardReader.filter_samples`."""

    @abstractmethod
    def check_sets(self, train: ShardReader, val: ShardReader) -> None:
        """Raise UserError if two annotated sets do not fit together."""

    @abstractmethod
    def load_encoder(self, weights: str) -> ImageEncoder:
        """Load the encoder to start from. Raises UserError if it cannot be used."""

    @abstractmethod
    def make_module(self, encoder: ImageEncoder) -> ModuleT:
        """Create the module from an encoder, whose parts it may take over. `classes` is set."""

    @abstractmethod
    def load_trained(self, run: Path, ema: bool) -> Trained[ModuleT]:
        """Load the newest checkpoint of a run of this recipe, or the moving average of its weights.

        Raises:
            UserError: If there is none.
        """

    @abstractmethod
    def prepare_evaluation(self, dist_info: DistInfo) -> None:
        """Create the loader of the validation set, `val`. The module is on its device."""

    @abstractmethod
    def compute_results(self, heartbeat: Callable[[], None], predictions: Path | None) -> Results:
        """Evaluate `module` on the validation set. Collective.

        Args:
            predictions: Folder for the predictions; None writes none.
        """

    @abstractmethod
    def draw_prediction(self, image: Image.Image) -> Image.Image:
        """Return a picture of what `module` predicts for an RGB image."""

    # ---- Training

    @property
    def description(self) -> str:
        return f"{self.recipe.TASK}: fine-tuning of {self._encoder_name}, {len(self.classes)} classes"

    def build(self, reader: ShardReader) -> TrainableModule:
        self.check_annotated("--data", reader)
        self._train, self.val = reader, self._open_val()
        self.check_sets(reader, self.val)
        assert self.recipe.weights is not None
        encoder = self.load_encoder(self.recipe.weights)
        self._check_encoder(encoder)
        manifest = reader.manifest
        self.classes, self.class_names, self._encoder_name = manifest.classes, manifest.class_names, encoder.name
        self._current = InitialWeights(
            encoder=encoder.name,
            digest=module_digest(encoder.vit),
            heads=encoder.heads,
            classes=manifest.classes,
            class_names=manifest.class_names,
            category_ids=manifest.category_ids,
        )
        self.module = self.make_module(encoder)
        return self.module

    def setup(self, run: RunDirectory, reader: ShardReader, module: TrainableModule, dist_info: DistInfo) -> None:
        self._run, self._dist_info = run, dist_info
        verify_checksums(dist_info, val=self.val)
        initial = broadcast_object(
            raise_on_all_ranks(lambda: self._check_initial_weights() if dist_info.rank == 0 else None)
        )
        assert initial is not None
        self._encoder_name, self._digest = initial.encoder, initial.digest
        self.prepare_evaluation(dist_info)

    def should_evaluate(self, step: int, total_steps: int, num_samples: int) -> bool:
        every = self.recipe.evaluation.every_epochs
        if every is None or step == total_steps:
            return step == total_steps
        batch = self.recipe.data.global_batch
        done, before = (at * batch / num_samples // every for at in (step, step - 1))
        return done > before

    def evaluate(self, step: int, heartbeat: Callable[[], None]) -> dict:
        results = self.compute_results(heartbeat, self._run.predictions if self.saves_predictions else None)
        document = {
            "task": self.recipe.TASK,
            "step": step,
            "weights": self.recipe.weights,
            "encoder": self._encoder_name,
            "digest": self._digest,
            "seed": self.recipe.seed,
            "data": {"place": self._train.paths[0], "samples": self._train.num_samples},
            "val": self.describe_val(),
            **results.values,
        }
        is_writer = self._dist_info.rank == 0
        raise_on_all_ranks(lambda: write_json(self._run.results, document) if is_writer else None)
        return results.metrics

    # ---- A trained model

    def restore(self, run: Path, ema: bool = False) -> Trained[ModuleT]:
        """Load the trained module of a run, in the precision of the recipe, and open the validation set, if any.

        Raises:
            UserError: As `load_trained`; or if the validation set has other classes.
        """
        trained = self.load_trained(run, ema)
        self.module = trained.module.to(DTYPES[self.recipe.engine.precision]).eval()
        self.classes, self.class_names = trained.initial.classes, trained.initial.class_names
        if self._val_path is not None:
            self.val = self._open_val()
            manifest = self.val.manifest
            if (manifest.classes, manifest.category_ids) != (self.classes, trained.initial.category_ids):
                raise UserError(f"--val {self._val_path}: its classes are not those of {run}; give another set")
        return trained

    def describe_val(self) -> dict:
        """Return what results.json says about the validation set."""
        val = self.val
        return {"place": val.paths[0], "samples": val.num_samples, "fingerprint": val.fingerprint}

    # ---- Checks

    def _open_val(self) -> ShardReader:
        assert self._val_path is not None
        reader = ShardReader(self._val_path, self.recipe.data.model_copy(update=FULL_SET))
        self.check_annotated("--val", reader)
        self.select_val_samples(reader)
        return reader

    def _check_initial_weights(self) -> InitialWeights:
        """Compare weights, classes and validation set with those of the run.

        Once there is a checkpoint, it decides weights and classes; those given now may differ.
        """
        initial, current = load_or_create(self._run, self._current), self._current
        if _evaluated_set(self._run) not in (None, self.val.fingerprint):
            raise UserError(
                f"--val {self._val_path}: not the set that {self._run} was evaluated on; pass that one, or a new --run"
            )
        if checkpoint.checkpoint_steps(self._run.checkpoints):
            return initial
        if initial.digest != current.digest:
            raise UserError(
                f"--weights {self.recipe.weights}: changed since {self._run} was started (digest {initial.digest[:8]}, "
                f"now {current.digest[:8]}); restore them, or pass a new --run"
            )
        if (initial.classes, initial.class_names) != (current.classes, current.class_names):
            raise UserError(
                f"--data {self._train.paths[0]}: names or order of the classes changed since {self._run} was "
                "started; pass a new --run"
            )
        return initial

    def _check_encoder(self, encoder: ImageEncoder) -> None:
        """Raise UserError if the recipe's settings do not match these weights."""
        recipe, (key, model) = self.recipe, self.expected_encoder
        if model and (encoder.width, len(encoder.vit.blocks)) != VIT_SIZES[model][:2]:
            raise UserError(
                f"--weights {recipe.weights}: width {encoder.width} and {len(encoder.vit.blocks)} blocks are not "
                f"{key}'s, {model}; use another recipe, or --set {key}=null"
            )
        for name in ("mean", "std"):
            trained, given = list(getattr(encoder, name)), list(getattr(recipe.data, name))
            if trained != given:
                raise UserError(f"data.{name}: {given} does not match --weights {recipe.weights}; set it to {trained}")


def _evaluated_set(run: RunDirectory) -> str | None:
    """Return the validation set's fingerprint in RUN/results.json; None if there is none."""
    path = run.existing_results
    if not path.is_file():
        return None
    try:
        return read_json(path)["val"].get("fingerprint")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged; restore it, or remove it (the next evaluation writes a new one)") from error


def meta_copy(module: nn.Module) -> nn.Module:
    """Copy a module to the meta device, on which FLOPs are counted, without copying its parameters."""
    shapes = {id(p): nn.Parameter(p.to("meta")) for p in module.parameters()}
    return copy.deepcopy(module, shapes).to("meta")
