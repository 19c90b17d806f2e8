"""Segmentation task: train a `Segmenter` on label maps, and evaluate it by sliding windows.

Invariant: each validation image is predicted alone, at its own size, on one rank; scores come from the sum of all
ranks' confusion matrices. So they do not depend on the world size.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.data.dense_loader import DenseEvalBatch, DenseEvalLoader
from pipeline.data.label_maps import RandomScaleCrop, ShorterSideResize, rescaled_size
from pipeline.data.pixels import normalize, resize
from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import all_gather_object, iterate_in_lockstep, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError, UserError
from pipeline.evals.datasets import check_disjoint, check_same_classes
from pipeline.evals.segmentation_scores import compute_scores, confusion_matrix
from pipeline.evals.sliding_window import predict_classes, slide, window_corners
from pipeline.io.atomic import atomic_path
from pipeline.models.trainable_module import TrainableModule
from pipeline.pictures.segmentation_overlay import render_segmentation
from pipeline.recipe.segmentation import SegmentationRecipe
from pipeline.tasks.finetune_task import FinetuneTask, Results, Trained
from pipeline.tasks.run_metadata import load_initial_weights
from pipeline.tasks.segmenter import Segmenter, count_forward_flops
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.encoder import ImageEncoder, build_vit, load_encoder
from pipeline.weights.run import read_run

logger = logging.getLogger(__name__)


class SegmentationTask(FinetuneTask[SegmentationRecipe, Segmenter]):
    def __init__(self, recipe: SegmentationRecipe, val: str | None) -> None:
        super().__init__(recipe, val)
        data, options = recipe.data, recipe.segmenter
        self.transform = RandomScaleCrop(recipe.seed, data.image_size, options.scale, options.cat_max_ratio, data.flip)

    @property
    def expected_encoder(self) -> tuple[str, str | None]:
        return "segmenter.encoder", self.recipe.segmenter.encoder

    def check_annotated(self, option: str, reader: ShardReader) -> None:
        if reader.manifest.annotation != "label_map":
            raise UserError(
                f"{option} {reader.paths[0]}: has no label maps; build one with `python -m data_prep ade20k`"
            )

    def check_sets(self, train: ShardReader, val: ShardReader) -> None:
        check_same_classes(train, val)
        check_disjoint(train, val)

    def load_encoder(self, weights: str) -> ImageEncoder:
        encoder = load_encoder(weights, self.recipe.data.image_size)
        if encoder.vit.pos_embed is None:
            raise UserError(
                f"--weights {weights}: encoders of LoMaR and BEiT have no absolute positions, which segmentation "
                "needs; use weights of another method"
            )
        return encoder

    def make_module(self, encoder: ImageEncoder) -> Segmenter:
        segmenter = Segmenter(encoder.vit, len(self.classes), self.recipe)
        self._flops = count_forward_flops(segmenter, self.recipe.data.image_size)  # before the engine shards weights
        return segmenter

    def load_trained(self, run: Path, ema: bool) -> Trained[Segmenter]:
        initial = load_initial_weights(RunDirectory(run))
        recipe, weights, step = read_run(run, SegmentationRecipe, ema)
        state = {name.removeprefix("vit."): tensor for name, tensor in weights.items() if name.startswith("vit.")}
        num_classes, width = len(weights["head.classifier.bias"]), state["pos_embed"].shape[2]
        if len(initial.classes) != num_classes or width % initial.heads:
            raise UserError(
                f"{RunDirectory(run).initial_weights}: {len(initial.classes)} classes and {initial.heads} heads do not "
                f"match the checkpoint ({num_classes} classes, width {width}); restore the file"
            )
        segmenter = Segmenter(build_vit(state, initial.heads, recipe.data.image_size), num_classes, recipe)
        segmenter.load_state_dict(weights)
        return Trained(segmenter, step, initial)

    def forward_flops(self) -> int:
        return self._flops

    def setup(self, run: RunDirectory, reader: ShardReader, module: TrainableModule, dist_info: DistInfo) -> None:
        super().setup(run, reader, module, dist_info)
        images = self.recipe.engine.micro_batch * dist_info.world_size
        if images < 2:
            raise AllRanksError("engine.micro_batch: batch normalization needs at least 2 images; set it to 2 or more")
        if images < self.recipe.data.global_batch:
            logger.warning(
                f"engine.micro_batch: batch normalization is over {images} images (a micro batch of all ranks), not "
                f"over the global batch of {self.recipe.data.global_batch}, so losses depend on the number of ranks; "
                "to avoid this, train without gradient accumulation (docs/segmentation.md)"
            )

    def prepare_evaluation(self, dist_info: DistInfo) -> None:
        self._device = dist_info.device
        data = self.recipe.data
        threads = data.decode_threads or dist_info.num_cpus
        self._loader = DenseEvalLoader(
            self.val,
            ShorterSideResize(data.image_size),
            data,
            1,
            dist_info.device,
            dist_info.rank,
            dist_info.world_size,
            threads,
        )

    def compute_results(self, heartbeat: Callable[[], None], predictions: Path | None) -> Results:
        side = self.recipe.data.image_size
        matrix = torch.zeros(len(self.classes), len(self.classes), dtype=torch.long, device=self._device)
        if predictions:
            predictions.mkdir(parents=True, exist_ok=True)
        for batch in iterate_in_lockstep(self._loader):
            surplus = self._surplus_passes(batch)
            classes = None if batch is None else self._predict(batch.images[0], batch.targets[0]["labels"].shape)
            for _ in range(surplus):
                self.module.predict_logits(torch.zeros(1, 3, side, side, device=self._device))
            if batch is not None and classes is not None:
                matrix += confusion_matrix(classes, batch.targets[0]["labels"].to(self._device), len(self.classes))
            if predictions:
                raise_on_all_ranks(partial(self._save, batch, classes, predictions))
            heartbeat()
        scores = compute_scores(torch.stack(all_gather_object(matrix.cpu())).sum(0), self.classes)
        values = scores._asdict()
        return Results(values, values)

    def draw_prediction(self, image: Image.Image) -> Image.Image:
        data = self.recipe.data
        width, height = rescaled_size(image.size, data.image_size)
        pixels = resize(torch.from_numpy(np.array(image)), [height, width], mode="bilinear")
        normalized = torch.empty(3, height, width)
        normalize(pixels, data, normalized)
        device = next(self.module.parameters()).device
        classes = self._predict(normalized.to(device), torch.Size(image.size[::-1]))
        return render_segmentation(image, classes.cpu().numpy(), self.classes)

    def _predict(self, image: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Return the classes, int64 (H, W) = size, of a normalized image (3, h, w)."""
        recipe = self.recipe
        window, stride, batch = recipe.data.image_size, recipe.window_stride, recipe.engine.micro_batch
        return predict_classes(slide(image, self.module.predict_logits, window, stride, batch), (size[0], size[1]))

    def _surplus_passes(self, batch: DenseEvalBatch | None) -> int:
        """Return how many forward passes the other ranks need more than this one: with ZeRO-3 each is collective."""
        recipe, passes = self.recipe, 0
        if recipe.engine.zero_stage < 3:
            return 0
        if batch is not None:
            height, width = batch.images.shape[-2:]
            windows = len(window_corners(height, width, recipe.data.image_size, recipe.window_stride))
            passes = -(-windows // recipe.engine.micro_batch)
        return max(all_gather_object(passes)) - passes

    def _save(self, batch: DenseEvalBatch | None, classes: torch.Tensor | None, folder: Path) -> None:
        """Write a prediction as KEY.png, with the classes numbered from 1 as in the data set."""
        if batch is None or classes is None:
            return
        with atomic_path(folder / f"{self.val.key_of(int(batch.sample_ids[0]))}.png") as path:
            Image.fromarray((classes + 1).to(torch.uint8).cpu().numpy()).save(path, "PNG")
