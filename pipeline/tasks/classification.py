"""Classification task: fine-tune an encoder with a linear head and evaluate it on a validation set."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.eval_loader import EvalLoader
from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import all_gather_object, iterate_in_lockstep
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.estimate.activation_memory import count_activation_bytes
from pipeline.estimate.memory import micro_batch_limits
from pipeline.evals.accuracy import TOP_K, count_topk_correct, topk_accuracies
from pipeline.evals.datasets import check_labeled, check_labeled_sets
from pipeline.methods.flops import training_flops
from pipeline.pictures.canvas import Column, render_grid
from pipeline.pictures.images import to_batch, to_pixels
from pipeline.recipe.classification import ClassificationRecipe
from pipeline.tasks.classifier import Classifier
from pipeline.tasks.finetune_task import FinetuneTask, Results, Trained, meta_copy
from pipeline.tasks.loaded_classifier import load_classifier
from pipeline.train.micro_batch import MicroBatchLimits
from pipeline.weights.encoder import ImageEncoder, load_encoder


class ClassificationTask(FinetuneTask[ClassificationRecipe, Classifier]):
    labeled = True

    @property
    def expected_encoder(self) -> tuple[str, str | None]:
        return "classifier.encoder", self.recipe.classifier.encoder

    def check_annotated(self, option: str, reader: ShardReader) -> None:
        check_labeled(option, reader)

    def check_sets(self, train: ShardReader, val: ShardReader) -> None:
        check_labeled_sets(train, val)

    def load_encoder(self, weights: str) -> ImageEncoder:
        return load_encoder(weights, self.recipe.data.image_size)

    def make_module(self, encoder: ImageEncoder) -> Classifier:
        trained_blocks, num_blocks = self.recipe.classifier.trained_blocks, len(encoder.vit.blocks)
        if trained_blocks is not None and trained_blocks > num_blocks:
            raise UserError(
                f"classifier.trained_blocks: {trained_blocks} exceeds the {num_blocks} blocks of --weights "
                f"{self.recipe.weights}"
            )
        classifier = Classifier(encoder.vit, len(self.classes), self.recipe)
        self._flops = _forward_flops(classifier, self.recipe.data.image_size)  # before the engine changes the module
        return classifier

    def load_trained(self, run: Path, ema: bool) -> Trained[Classifier]:
        loaded = load_classifier(run, ema)
        return Trained(loaded.classifier, loaded.step, loaded.initial)

    def forward_flops(self) -> int:
        return self._flops

    def micro_batch_limits(self, reader: ShardReader, world_size: int, available_gib: float) -> MicroBatchLimits:
        if not hasattr(self, "module"):
            self.build(reader)
        forward = self.forward_flops()
        flops = training_flops(forward) + forward * self.recipe.engine.activation_checkpointing
        parameters = sum(p.numel() for p in self.module.parameters())
        image_bytes = _activation_bytes(self.module, self.recipe)
        return micro_batch_limits(self.recipe, parameters, image_bytes, flops, world_size, available_gib)

    def prepare_evaluation(self, dist_info: DistInfo) -> None:
        self._device = dist_info.device
        self._loader = EvalLoader(
            self.val,
            self.recipe.data,
            self.recipe.engine.micro_batch,
            dist_info.device,
            dist_info.rank,
            dist_info.world_size,
            self.recipe.data.decode_threads or dist_info.num_cpus,
            self.recipe.eval_resize,
            deterministic=self.recipe.engine.deterministic,
        )

    def compute_results(self, heartbeat: Callable[[], None], predictions: Path | None) -> Results:
        size, counts = self.recipe.data.image_size, [0, 0, 0]
        for batch in iterate_in_lockstep(self._loader):
            if batch is None:  # other ranks have batches left; ZeRO-3 needs this rank's forward pass
                self.module.predict_logits(torch.zeros(1, 3, size, size, device=self._device))
            else:
                assert batch.labels is not None
                logits = self.module.predict_logits(batch.images)
                batch_counts = *count_topk_correct(logits, batch.labels), len(logits)
                counts = [sum(pair) for pair in zip(counts, batch_counts, strict=True)]
            heartbeat()
        top1, top5, total = [sum(column) for column in zip(*all_gather_object(counts), strict=True)]
        accuracies = topk_accuracies(top1, top5, total, len(self.classes))
        metrics = {}
        for name, accuracy in accuracies.items():
            low, high = accuracy.interval
            metrics |= {name: accuracy.share, f"{name}_low": low, f"{name}_high": high}
        return Results({name: accuracy.as_json() for name, accuracy in accuracies.items()}, metrics)

    def draw_prediction(self, image: Image.Image) -> Image.Image:
        data = self.recipe.data
        images = to_batch([image], data, data.image_size)
        device = next(self.module.parameters()).device
        shares = self.module.predict_logits(images.to(device))[0].softmax(0).cpu()
        best = shares.topk(min(TOP_K, len(self.classes)))
        names = self.class_names or self.classes
        lines = [f"{names[i]} {share:.0%}" for share, i in zip(best.values, best.indices.tolist(), strict=True)]
        return render_grid([Column("", [np.asarray(to_pixels(images, data)[0])])], "; ".join(lines))


def _forward_flops(classifier: Classifier, size: int) -> int:
    """Count floating-point operations per image."""
    copied = meta_copy(classifier)
    assert isinstance(copied, Classifier)
    with FlopCounterMode(display=False) as counter:
        copied.predict_logits(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def _activation_bytes(classifier: Classifier, recipe: ClassificationRecipe) -> int:
    """Count the bytes that autograd saves per image. Augmentation has no gradient."""
    module, size = meta_copy(classifier), recipe.data.image_size
    assert isinstance(module, Classifier)
    module.vit.set_grad_checkpointing(False)
    if recipe.engine.precision != "fp32":
        module = module.to(torch.bfloat16)
    return count_activation_bytes(
        module,
        list(module.vit.blocks),
        lambda batch: module.compute_logits(torch.empty(batch, 3, size, size)),
        recipe.engine.activation_checkpointing,
    )
