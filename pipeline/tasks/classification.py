"""Fine-tuning as the loop's task: an encoder becomes a classifier, which is measured on a set of its own.

    RUN/accuracy.json    the last measurement: top-1 and top-5 with intervals, and what it is of
    RUN/weights.json     what the run began with: see `finetune.begun`

Invariant: each sample of the validation set counts exactly once, whatever the number of ranks; a figure is of
all its samples or there is none.
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
from pipeline.evals.accuracy import RESULT, Accuracy, count_topk_correct, topk_accuracies
from pipeline.evals.datasets import check_labelled, verify_checksums
from pipeline.evals.feature_extractor import digest
from pipeline.io.atomic import read_json, write_json
from pipeline.recipe.finetune import FinetuneRecipe
from pipeline.recipe.sections import SIZES
from pipeline.tasks.classifier import Classifier
from pipeline.tasks.run_metadata import InitialWeights, load_or_create
from pipeline.train import checkpoint
from pipeline.train.task import Task
from pipeline.train.trainer import train
from pipeline.weights.encoder import ImageEncoder, load_encoder


def finetune(
    recipe: FinetuneRecipe, data: str, val: str, run: Path, deepspeed_config: Path | None = None
) -> None:
    """Fine-tune the recipe's weights on the labelled shard set `data`, and judge them on `val`; as `train`
    says."""
    train(Finetuning(recipe, val), [data], run, deepspeed_config)


class Finetuning(Task):
    labelled = True

    def __init__(self, recipe: FinetuneRecipe, val: str):
        self.recipe, self._place = recipe, val

    @property
    def title(self) -> str:
        return f"fine-tuning of {self._name}, {self._classes} classes"

    def build(self, reader: ShardReader) -> Classifier:
        whole = self.recipe.data.model_copy(
            update={"sources": None, "subset": 1.0, "subset_by_class": False, "holdout": 0.0}
        )
        self._train, self._val = reader, ShardReader(self._place, whole)
        check_labelled(reader, self._val)
        encoder = load_encoder(self.recipe.weights, self.recipe.data.image_size)
        _check_encoder(encoder, self.recipe)
        self._name, self._classes = encoder.name, len(reader.manifest.classes)
        self._found = InitialWeights(
            encoder=encoder.name,
            digest=digest(encoder.vit),
            heads=encoder.heads,
            classes=reader.manifest.classes,
            class_names=reader.manifest.class_names,
        )
        self._classifier = Classifier(encoder.vit, self._classes, self.recipe)
        self._flops = _forward_flops(self._classifier, self.recipe.data.image_size)
        return self._classifier

    def forward_flops(self) -> int:
        return self._flops

    def load_or_create(self, run: Path, reader: ShardReader, module: Classifier, dist_info: DistInfo) -> None:
        self._run, self._world = run, dist_info
        verify_checksums(dist_info, val=self._val)
        begun = broadcast_object(raise_on_all_ranks(self._begun if dist_info.rank == 0 else lambda: None))
        self._name, self._digest = begun.encoder, begun.digest
        recipe = self.recipe
        threads = recipe.data.decode_threads or dist_info.num_cpus
        place = dist_info.device, dist_info.rank, dist_info.world_size, threads
        self._loader = EvalLoader(self._val, recipe.data, recipe.engine.micro_batch, *place, recipe.resize)

    def _begun(self) -> InitialWeights:
        """What the run began with. UserError where it was measured on another set, or where nothing is saved
        yet and weights or classes are others by now; what is saved holds its own."""
        run, found = self._run, self._found
        begun = load_or_create(run, found)
        if _measured_on(run) not in (None, self._val.fingerprint):
            raise UserError(
                f"--val {self._place}: is another set than {run} was measured on; figures of two sets are no "
                "curve: give that one, or a new --run"
            )
        if checkpoint.checkpoint_steps(run / "checkpoints"):
            return begun
        if begun.digest != found.digest:
            raise UserError(
                f"--weights {self.recipe.weights}: are others ({found.encoder}) than those that "
                f"{run} began with ({begun.encoder}); give a new --run"
            )
        if (begun.classes, begun.class_names) != (found.classes, found.class_names):
            raise UserError(
                f"--data {self._train.places[0]}: its classes have other names, or another order, than those "
                f"that {run} began with; give a new --run"
            )
        return begun

    def evaluates(self, step: int, total_steps: int, num_samples: int) -> bool:
        every = self.recipe.evaluation.every_epochs
        if every is None or step == total_steps:
            return step == total_steps
        batch = self.recipe.data.global_batch
        done, before = (at * batch / num_samples // every for at in (step, step - 1))
        return done > before

    def evaluate(self, step: int, heartbeat: Callable[[], None]) -> dict:
        found = self._measured(heartbeat)
        result = {
            "step": step,
            "weights": self.recipe.weights,
            "encoder": self._name,
            "digest": self._digest,
            "seed": self.recipe.seed,
            "data": {"place": self._train.places[0], "samples": self._train.num_samples},
            "val": {
                "place": self._val.places[0],
                "samples": self._val.num_samples,
                "fingerprint": self._val.fingerprint,
            },
            **{name: accuracy.as_json() for name, accuracy in found.items()},
        }
        raise_on_all_ranks(lambda: write_json(self._run / RESULT, result) if self._world.rank == 0 else None)
        figures = {}
        for name, accuracy in found.items():
            low, high = accuracy.interval
            figures |= {name: accuracy.share, f"{name}_low": low, f"{name}_high": high}
        return figures

    def _measured(self, heartbeat: Callable[[], None]) -> dict[str, Accuracy]:
        size, device, counts = self.recipe.data.image_size, self._world.device, [0, 0, 0]
        for batch in iterate_in_lockstep(self._loader):
            if batch is None:
                self._classifier.scores(torch.zeros(1, 3, size, size, device=device))
            else:
                scores = self._classifier.scores(batch.images)
                found = *count_topk_correct(scores, batch.labels), len(scores)
                counts = [sum(pair) for pair in zip(counts, found, strict=True)]
            heartbeat()
        totals = [sum(column) for column in zip(*all_gather_object(counts), strict=True)]
        return topk_accuracies(*totals, self._classes)


def _measured_on(run: Path) -> str | None:
    """The validation set's fingerprint in RUN/accuracy.json; None where there is none."""
    if not (run / RESULT).is_file():
        return None
    try:
        return read_json(run / RESULT)["val"].get("fingerprint")
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{run / RESULT}: is not what a fine-tuning measures; mend or remove it") from None


def _forward_flops(classifier: Classifier, size: int) -> int:
    """Counted on shapes alone, before an engine takes the parameters into its hands."""
    shapes = {id(p): nn.Parameter(p.to("meta")) for p in classifier.parameters()}
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(classifier, shapes).to("meta").scores(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def _check_encoder(encoder: ImageEncoder, recipe: FinetuneRecipe) -> None:
    """UserError where the recipe's settings are not for these weights."""
    wanted = recipe.classifier.encoder
    if wanted and (encoder.width, len(encoder.vit.blocks)) != SIZES[wanted][:2]:
        width, depth, _ = SIZES[wanted]
        raise UserError(
            f"--weights {recipe.weights}: is {encoder.width} wide and {len(encoder.vit.blocks)} blocks deep; "
            f"these settings are for {wanted}, {width} wide and {depth} deep: take another recipe, or --set "
            "classifier.encoder=null"
        )
    for name in ("mean", "std"):
        trained, asked = list(getattr(encoder, name)), list(getattr(recipe.data, name))
        if trained != asked:
            raise UserError(
                f"data.{name}: is {asked}, but --weights {recipe.weights} was trained with {trained}; "
                "set that"
            )
