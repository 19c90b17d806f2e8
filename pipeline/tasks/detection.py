"""Detection task: train ViTDet with Mask R-CNN on instances, and evaluate it by COCO's average precision.

    RUN/predictions/detections.json    detections on the validation set, in COCO's results format

Invariant: each validation image is evaluated exactly once, on any world size, at its stored size.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models.detection.roi_heads import paste_masks_in_image

from pipeline.data.dense_loader import DenseEvalBatch, DenseEvalLoader
from pipeline.data.instances import Annotation, encode_mask
from pipeline.data.large_scale_jitter import fit
from pipeline.data.pixels import normalize, resize
from pipeline.data.placement import Placement
from pipeline.data.reader import ShardReader
from pipeline.distributed.collectives import broadcast_object, gather_object, iterate_in_lockstep, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.coco_ap import average_precision, ground_truth
from pipeline.evals.datasets import check_disjoint
from pipeline.io.atomic import atomic_write
from pipeline.pictures.detections import MIN_SCORE, draw_detections
from pipeline.recipe.detection import DetectionRecipe
from pipeline.tasks.detector import Detector, build_detector, detector_from_encoder, training_forward_flops
from pipeline.tasks.finetune_task import FinetuneTask, Results, Trained, meta_copy
from pipeline.tasks.instance_data import (
    EvalTransform,
    TrainTransform,
    check_categories,
    check_instances,
    leave_out_unlisted,
    log_skipped,
    read_annotations,
    select_annotated,
)
from pipeline.tasks.run_metadata import load_initial_weights
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.encoder import ImageEncoder, load_encoder
from pipeline.weights.run import read_run

DETECTIONS = "detections.json"
MASK_THRESHOLD = 0.5


class DetectionTask(FinetuneTask[DetectionRecipe, Detector]):
    saves_predictions = True

    @property
    def expected_encoder(self) -> tuple[str, str | None]:
        return "detector.encoder", self.recipe.detector.encoder

    def select_samples(self, reader: ShardReader) -> None:
        check_instances("--data", reader)
        select_annotated(reader)

    def check_annotated(self, option: str, reader: ShardReader) -> None:
        check_instances(option, reader)

    def select_val_samples(self, reader: ShardReader) -> None:
        leave_out_unlisted("--val", reader)

    def check_sets(self, train: ShardReader, val: ShardReader) -> None:
        check_categories(train, val)
        check_disjoint(train, val)

    def load_encoder(self, weights: str) -> ImageEncoder:
        encoder = load_encoder(weights)
        if encoder.vit.pos_embed is None:
            raise UserError(
                f"--weights {weights}: encoders of LoMaR and BEiT have relative positions, which the detector does not "
                "support; give weights of mae, emae or efficient_mae"
            )
        return encoder

    def build(self, reader: ShardReader) -> Detector:
        category_ids = reader.manifest.category_ids
        self.transform = TrainTransform(
            self.recipe.seed,
            self.recipe.data.image_size,
            self.recipe.detector.scale,
            self.recipe.data.flip,
            {number: label for label, number in enumerate(category_ids, 1)},
        )
        super().build(reader)
        return self.module

    def make_module(self, encoder: ImageEncoder) -> Detector:
        detector = detector_from_encoder(encoder, len(self.classes), self.recipe)
        copied = meta_copy(detector)
        assert isinstance(copied, Detector)
        self._flops = training_forward_flops(copied, self.recipe)  # before the engine changes the module
        return detector

    def load_trained(self, run: Path, ema: bool) -> Trained[Detector]:
        initial = load_initial_weights(RunDirectory(run))
        recipe, weights, step = read_run(run, DetectionRecipe, ema)
        width = len(weights["vit.patch_embed.proj.weight"])
        depth = len({name.split(".")[2] for name in weights if name.startswith("vit.blocks.")})
        detector = build_detector(width, depth, initial.heads, len(initial.classes), recipe)
        detector.load_state_dict(weights)
        return Trained(detector, step, initial)

    def forward_flops(self) -> int:
        return self._flops

    def prepare_evaluation(self, dist_info: DistInfo) -> None:
        self._device = dist_info.device
        self._loader = DenseEvalLoader(
            self.val,
            EvalTransform(self.recipe.data.image_size),
            self.recipe.data,
            self.recipe.engine.micro_batch,
            dist_info.device,
            dist_info.rank,
            dist_info.world_size,
            self.recipe.data.decode_threads or dist_info.num_cpus,
        )

    def compute_results(self, heartbeat: Callable[[], None], predictions: Path | None) -> Results:
        size, detections = self.recipe.data.image_size, []
        for batch in iterate_in_lockstep(self._loader):
            if batch is None:  # other ranks have batches left; ZeRO-3 needs this rank's forward pass
                self.module.detect(torch.zeros(1, 3, size, size, device=self._device), [(size, size)])
            else:
                detections += self._detect_batch(batch)
            heartbeat()
        of_ranks = gather_object(detections)
        figures = broadcast_object(
            raise_on_all_ranks(lambda: self._score(of_ranks, predictions) if of_ranks is not None else None)
        )
        assert figures is not None
        return Results(figures, {name: value for name, value in figures.items() if value is not None})

    def draw_prediction(self, image: Image.Image) -> Image.Image:
        data = self.recipe.data
        placement = fit(image.size, data.image_size)
        pixels = torch.from_numpy(np.array(image))
        canvas = torch.zeros(1, 3, data.image_size, data.image_size)
        width, height = placement.extent
        normalize(resize(pixels, [height, width], "bilinear"), data, canvas[0, :, :height, :width])
        device = next(self.module.parameters()).device
        (found,) = self.module.detect(canvas.to(device), [(height, width)])
        found = {name: values[found["scores"] >= MIN_SCORE] for name, values in found.items()}
        boxes, masks = _to_stored(found, placement)
        names = [self.classes[label - 1] for label in found["labels"].tolist()]
        return draw_detections(image, boxes, masks, names, found["scores"].tolist())

    def _detect_batch(self, batch: DenseEvalBatch) -> list[dict]:
        """Return the detections of a batch in COCO's results format."""
        sizes = [(height, width) for width, height in (placement.extent for placement in batch.placements)]
        rows, category_ids = [], self.val.manifest.category_ids
        for found, placement, target in zip(
            self.module.detect(batch.images, sizes), batch.placements, batch.targets, strict=True
        ):
            boxes, masks = _to_stored(found, placement)
            scores, labels = found["scores"].tolist(), found["labels"].tolist()
            for (x1, y1, x2, y2), mask, score, label in zip(boxes.tolist(), masks, scores, labels, strict=True):
                rows.append(
                    {
                        "image_id": target["image_id"],
                        "category_id": category_ids[label - 1],
                        "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                        "score": round(score, 6),
                        "segmentation": encode_mask(mask),
                    }
                )
        return rows

    def _score(self, of_ranks: list[list[dict]], predictions: Path | None) -> dict[str, float | None]:
        """Write the detections of all ranks, and compute the figures. Called on rank 0."""
        detections = [row for rows in of_ranks for row in rows]
        if predictions:
            predictions.mkdir(parents=True, exist_ok=True)
            atomic_write(predictions / DETECTIONS, json.dumps(detections))
        annotations: list[Annotation] = [one for of_shard in read_annotations(self.val) for one in of_shard if one]
        log_skipped(f"--val {self.val.paths[0]}", sum((one.skipped for one in annotations), Counter()))
        return average_precision(ground_truth(annotations, self.classes, self.val.manifest.category_ids), detections)


def _to_stored(found: dict[str, torch.Tensor], placement: Placement) -> tuple[np.ndarray, list[np.ndarray]]:
    """Map detections to the stored image: boxes, float64 (n, 4), and n masks, uint8 (H, W)."""
    width, height = placement.stored
    boxes = placement.unmap_boxes(found["boxes"].cpu().numpy())
    boxes = np.clip(boxes, 0, [width, height, width, height])
    masks = [  # one at a time: in float32, 100 masks of a photograph of 24 megapixels would take 10 GB
        (paste_masks_in_image(mask[None], box[None], (height, width))[0, 0] >= MASK_THRESHOLD).numpy().astype(np.uint8)
        for mask, box in zip(found["masks"].cpu(), torch.from_numpy(boxes).float(), strict=True)
    ]
    return boxes, masks
