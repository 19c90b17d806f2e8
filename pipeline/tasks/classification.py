"""Classification task: fine-tune an encoder with a linear head and evaluate it on a validation set.

    RUN/accuracy.json    last evaluation: top-1 and top-5 with intervals, and what was evaluated
    RUN/weights.json     initial weights: see `run_metadata`

Invariant: an accuracy counts each validation sample exactly once, on any world size, or is not reported.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.eval_loader import EvalLoader
from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import (
    all_gather_object,
    broadcast_object,
    iterate_in_lockstep,
    raise_on_all_ranks,
)
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.accuracy import Accuracy, count_topk_correct, topk_accuracies
from pipeline.evals.datasets import check_labeled_sets, verify_checksums
from pipeline.evals.frozen_encoder import module_digest
from pipeline.io.atomic import read_json, write_json
from pipeline.models.trainable_module import TrainableModule
from pipeline.recipe.finetune import FinetuneRecipe
from pipeline.recipe.sections import VIT_SIZES
from pipeline.tasks.classifier import Classifier
from pipeline.tasks.run_metadata import InitialWeights, load_or_create
from pipeline.train import checkpoint
from pipeline.train.run_directory import RunDirectory
from pipeline.train.task import Task
from pipeline.train.trainer import Trainer
from pipeline.weights.encoder import ImageEncoder, load_encoder


def finetune(recipe: FinetuneRecipe, data: str, val: str, run: Path, deepspeed_config: Path | None = None) -> None:
    """Fine-tune the recipe's weights; the errors are those of `pipeline.train.trainer.Trainer`.

    Args:
        recipe: Recipe with `weights` set.
        data: Labeled shard set to train on: directory or URL.
        val: Labeled shard set to evaluate on.
        run: Run directory, new or to be resumed.
        deepspeed_config: JSON file of engine settings.
    """
    Trainer(Finetuning(recipe, val), [data], RunDirectory(run), deepspeed_config).train()


class Finetuning(Task[FinetuneRecipe]):
    labeled = True

    def __init__(self, recipe: FinetuneRecipe, val: str) -> None:
        self.recipe, self._val_path = recipe, val

    @property
    def description(self) -> str:
        return f"fine-tuning of {self._encoder_name}, {self._num_classes} classes"

    def build(self, reader: ShardReader) -> Classifier:
        full_set = {"sources": None, "subset": 1.0, "subset_by_class": False, "holdout": 0.0}
        self._train = reader
        self._val = ShardReader(self._val_path, self.recipe.data.model_copy(update=full_set))
        check_labeled_sets(reader, self._val)
        assert self.recipe.weights is not None
        encoder = load_encoder(self.recipe.weights, self.recipe.data.image_size)
        _check_encoder(encoder, self.recipe)
        self._encoder_name, self._num_classes = encoder.name, len(reader.manifest.classes)
        self._current = InitialWeights(
            encoder=encoder.name,
            digest=module_digest(encoder.vit),
            heads=encoder.heads,
            classes=reader.manifest.classes,
            class_names=reader.manifest.class_names,
        )
        self._classifier = Classifier(encoder.vit, self._num_classes, self.recipe)
        self._flops = _forward_flops(self._classifier, self.recipe.data.image_size)
        return self._classifier

    def forward_flops(self) -> int:
        return self._flops

    def setup(self, run: RunDirectory, reader: ShardReader, module: TrainableModule, dist_info: DistInfo) -> None:
        self._run, self._dist_info = run, dist_info
        verify_checksums(dist_info, val=self._val)
        initial = broadcast_object(
            raise_on_all_ranks(lambda: self._check_initial_weights() if dist_info.rank == 0 else None)
        )
        assert initial is not None
        self._encoder_name, self._digest = initial.encoder, initial.digest
        self._loader = EvalLoader(
            self._val,
            self.recipe.data,
            self.recipe.engine.micro_batch,
            dist_info.device,
            dist_info.rank,
            dist_info.world_size,
            self.recipe.data.decode_threads or dist_info.num_cpus,
            self.recipe.eval_resize,
        )

    def _check_initial_weights(self) -> InitialWeights:
        """Compare weights, classes and validation set with those of the run.

        Once there is a checkpoint, it decides weights and classes; those given now may differ.
        """
        initial, current = load_or_create(self._run, self._current), self._current
        if _evaluated_set(self._run) not in (None, self._val.fingerprint):
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

    def should_evaluate(self, step: int, total_steps: int, num_samples: int) -> bool:
        every = self.recipe.evaluation.every_epochs
        if every is None or step == total_steps:
            return step == total_steps
        batch = self.recipe.data.global_batch
        done, before = (at * batch / num_samples // every for at in (step, step - 1))
        return done > before

    def evaluate(self, step: int, heartbeat: Callable[[], None]) -> dict:
        accuracies = self._compute_accuracies(heartbeat)
        result = {
            "step": step,
            "weights": self.recipe.weights,
            "encoder": self._encoder_name,
            "digest": self._digest,
            "seed": self.recipe.seed,
            "data": {"place": self._train.paths[0], "samples": self._train.num_samples},
            "val": {
                "place": self._val.paths[0],
                "samples": self._val.num_samples,
                "fingerprint": self._val.fingerprint,
            },
            **{name: accuracy.as_json() for name, accuracy in accuracies.items()},
        }
        is_writer = self._dist_info.rank == 0
        raise_on_all_ranks(lambda: write_json(self._run.accuracy, result) if is_writer else None)
        metrics = {}
        for name, accuracy in accuracies.items():
            low, high = accuracy.interval
            metrics |= {name: accuracy.share, f"{name}_low": low, f"{name}_high": high}
        return metrics

    def _compute_accuracies(self, heartbeat: Callable[[], None]) -> dict[str, Accuracy]:
        size, device, counts = self.recipe.data.image_size, self._dist_info.device, [0, 0, 0]
        for batch in iterate_in_lockstep(self._loader):
            if batch is None:  # other ranks have batches left; ZeRO-3 needs this rank's forward pass
                self._classifier.predict_logits(torch.zeros(1, 3, size, size, device=device))
            else:
                assert batch.labels is not None
                logits = self._classifier.predict_logits(batch.images)
                batch_counts = *count_topk_correct(logits, batch.labels), len(logits)
                counts = [sum(pair) for pair in zip(counts, batch_counts, strict=True)]
            heartbeat()
        top1, top5, total = [sum(column) for column in zip(*all_gather_object(counts), strict=True)]
        return topk_accuracies(top1, top5, total, self._num_classes)


def _evaluated_set(run: RunDirectory) -> str | None:
    """Return the validation set's fingerprint in RUN/accuracy.json; None if there is none."""
    if not run.accuracy.is_file():
        return None
    try:
        return read_json(run.accuracy)["val"].get("fingerprint")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run.accuracy}: damaged; restore it, or remove it (the next evaluation writes a new one)"
        ) from error


def _forward_flops(classifier: Classifier, size: int) -> int:
    """Count floating-point operations per image on the meta device, without copying the parameters."""
    shapes = {id(p): nn.Parameter(p.to("meta")) for p in classifier.parameters()}
    images = torch.empty(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(classifier, shapes).to("meta").predict_logits(images)
    return counter.get_total_flops()


def _check_encoder(encoder: ImageEncoder, recipe: FinetuneRecipe) -> None:
    """Raise UserError if the recipe's settings do not match these weights."""
    model = recipe.classifier.encoder
    if model and (encoder.width, len(encoder.vit.blocks)) != VIT_SIZES[model][:2]:
        raise UserError(
            f"--weights {recipe.weights}: width {encoder.width} and {len(encoder.vit.blocks)} blocks are not "
            f"classifier.encoder's, {model}; use another recipe, or --set classifier.encoder=null"
        )
    trained_blocks, num_blocks = recipe.classifier.trained_blocks, len(encoder.vit.blocks)
    if trained_blocks is not None and trained_blocks > num_blocks:
        raise UserError(
            f"classifier.trained_blocks: {trained_blocks} exceeds the {num_blocks} blocks of --weights {recipe.weights}"
        )
    for name in ("mean", "std"):
        trained, given = list(getattr(encoder, name)), list(getattr(recipe.data, name))
        if trained != given:
            raise UserError(f"data.{name}: {given} does not match --weights {recipe.weights}; set it to {trained}")
