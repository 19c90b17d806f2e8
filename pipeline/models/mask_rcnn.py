"""Mask R-CNN (He et al. 2017) in ViTDet's form, from torchvision's parts.

It differs from torchvision's model as detectron2's does: layer norm in the heads, two convolutions in the RPN,
RoIAlign with `aligned`, plain L1 losses of boxes, binary targets of masks, and 1000 proposals.

Invariant: a loss is the mean over images of a per-image loss, so it does not depend on how a batch is split; with one
image per GPU, as in ViTDet, detectron2's losses are the same. No random generator is used.
"""

from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import roi_align

from pipeline.models.stateless_sampling import StatelessSampler

NUM_LEVELS = 5
ANCHOR_STRIDES = 8
"""Side of a square anchor over the stride of its map: 32 to 512 px with patches of 16."""
CANONICAL_PATCHES = 14
"""Side, in patches, of boxes that are pooled from the map at the stride of a patch: 224 px with patches of 16."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
RPN_SAMPLES = 256
"""Anchors per image that the RPN is trained on."""
NUM_KEYS = 2
"""Random numbers in [0, 1) per image, the key of the sampling."""
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
BOX_SIZE, MASK_SIZE = 7, 14
"""Side of the pooled features of a proposal; masks have twice MASK_SIZE."""


class RoIPooler(nn.Module):
    """RoIAlign from the pyramid's level for the size of each box (FPN's equation 1), as in detectron2."""

    def __init__(self, output_size: int, patch_size: int) -> None:
        super().__init__()
        self.output_size, self.patch_size = output_size, patch_size

    def forward(
        self, features: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_sizes: object = None
    ) -> torch.Tensor:
        """Pool boxes (n, 4) of each image from the maps at strides P / 4 to 2 P: (n, C, size, size), in their type."""
        maps = [features[name] for name in ("0", "1", "2", "3")]
        rois = torch.cat([F.pad(of_image, (1, 0), value=number) for number, of_image in enumerate(boxes)])
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        level = (2 + (side / (CANONICAL_PATCHES * self.patch_size) + 1e-8).log2()).floor().clamp(0, 3)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.output_size, self.output_size)
        for number, feature_map in enumerate(maps):
            rows = torch.where(level == number)[0]
            scale = 4 / (self.patch_size * 2**number)
            # In fp32: torchvision has no kernel for bfloat16, and coordinates need the precision.
            part = roi_align(feature_map.float(), rois[rows].float(), self.output_size, scale, aligned=True)
            pooled = pooled.index_copy(0, rows, part.to(pooled.dtype))
        return pooled


class MaskRCNN(nn.Module):
    """RPN, box head and mask head on a feature pyramid.

    Args:
        num_classes: Without the background, whose label is 0.
        patch_size: P, of the ViT; the maps have strides from P / 4 to 4 P.
        width: Channels of the pyramid and of the heads' convolutions.
        convs: Convolutions of the box head and of the mask head.
        fc_width: Width of the box head's linear layer.
        samples: Proposals per image that the box head is trained on.
    """

    def __init__(
        self,
        num_classes: int,
        patch_size: int = 16,
        width: int = 256,
        convs: int = 4,
        fc_width: int = 1024,
        samples: int = 512,
    ):
        super().__init__()
        anchor_sizes = tuple((ANCHOR_STRIDES * patch_size * 2**level // 4,) for level in range(NUM_LEVELS))
        self.rpn = RegionProposalNetwork(
            AnchorGenerator(anchor_sizes, (ASPECT_RATIOS,) * NUM_LEVELS),
            RPNHead(width, len(ASPECT_RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=RPN_SAMPLES,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        mask_head = MaskRCNNHeads(width, (width,) * convs, 1, LayerNorm2d)
        self.roi_heads = RoIHeads(
            RoIPooler(BOX_SIZE, patch_size),
            FastRCNNConvFCHead((width, BOX_SIZE, BOX_SIZE), [width] * convs, [fc_width], LayerNorm2d),
            FastRCNNPredictor(fc_width, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=samples,
            positive_fraction=0.25,
            bbox_reg_weights=BOX_WEIGHTS,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=RoIPooler(MASK_SIZE, patch_size),
            mask_head=mask_head,
            mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
        )
        self.rpn_sampler = StatelessSampler(RPN_SAMPLES, 0.5, stream=0)
        self.roi_sampler = StatelessSampler(samples, 0.25, stream=1)
        heads: Any = self.roi_heads
        heads.fg_bg_sampler = self.roi_sampler
        _initialize(heads)

    def compute_losses(
        self, maps: list[torch.Tensor], images: torch.Tensor, targets: list[dict[str, Any]], keys: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the losses by name, float32 scalars.

        Args:
            maps: Of `SimpleFeaturePyramid`.
            images: (B, 3, S, S), for their shape.
            targets: Per image `boxes`, float32 (n, 4) with x1, y1, x2, y2 in pixels; `labels`, int64 (n,), from 1 on;
                `masks`, uint8 (n, S, S); and `size`, height and width of the part that is no padding.
            keys: (B, 2) random numbers in [0, 1), multiples of 2^-24.
        """
        sizes = [target["size"] for target in targets]
        self.rpn_sampler.keys = self.roi_sampler.keys = keys
        proposals, losses = self._propose(maps, images, sizes, targets)
        heads: Any = self.roi_heads
        features = _named(maps)
        proposals, matched, labels, box_targets = heads.select_training_samples(proposals, targets)
        scores, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals)))
        counts = [len(of_image) for of_image in proposals]
        losses |= _box_losses(scores.float().split(counts), deltas.float().split(counts), labels, box_targets)
        positive = [torch.where(of_image > 0)[0] for of_image in labels]
        boxes = [of_image[rows] for of_image, rows in zip(proposals, positive, strict=True)]
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes))).float()
        of_images = zip(
            masks.split([len(rows) for rows in positive]), boxes, labels, matched, positive, targets, strict=True
        )
        mask_losses = [
            _mask_loss(logits, box, label[rows], match[rows], target["masks"])
            for logits, box, label, match, rows, target in of_images
        ]
        return {**losses, "loss_mask": torch.stack(mask_losses).mean()}

    @torch.no_grad()
    def detect(
        self, maps: list[torch.Tensor], images: torch.Tensor, sizes: list[tuple[int, int]]
    ) -> list[dict[str, torch.Tensor]]:
        """Return per image up to 100 detections, by descending score.

        Args:
            sizes: Height and width of the part of each image that is no padding.

        Returns:
            `boxes`, float32 (n, 4); `labels`, int64 (n,), from 1 on; `scores`, float32 (n,); and `masks`, float32
            (n, 1, 28, 28), probabilities inside the box.
        """
        training = self.training
        self.eval()  # torchvision's parts depend on it
        try:
            proposals, _ = self._propose(maps, images, sizes, None)
            heads: Any = self.roi_heads
            features, counts = _named(maps), [len(of_image) for of_image in proposals]
            scores, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals)))
            found = heads.postprocess_detections(scores.float(), deltas.float(), proposals, sizes)
            assert sum(counts) == len(scores)
            boxes = found[0]
            masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes))).float().sigmoid()
            masks = masks[torch.arange(len(masks), device=masks.device), torch.cat(found[2])][:, None]
            masks = masks.split([len(of_image) for of_image in boxes])
        finally:
            self.train(training)
        names = ("boxes", "scores", "labels", "masks")
        return [dict(zip(names, values, strict=True)) for values in zip(*found, masks, strict=True)]

    def _propose(
        self,
        maps: list[torch.Tensor],
        images: torch.Tensor,
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None,
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Return proposals (n, 4) per image and, with targets, the losses of the RPN."""
        rpn = self.rpn
        objectness, deltas = rpn.head(maps)
        per_level = [level[0].numel() for level in objectness]
        anchors = rpn.anchor_generator(ImageList(images.float(), sizes), [level.float() for level in maps])
        objectness, deltas = (part.float() for part in concat_box_prediction_layers(objectness, deltas))
        decoded = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = rpn.filter_proposals(decoded, objectness, sizes, per_level)
        if targets is None:
            return proposals, {}
        labels, matched_boxes = rpn.assign_targets_to_anchors(anchors, targets)
        box_targets = rpn.box_coder.encode(matched_boxes, anchors)
        positives, negatives = self.rpn_sampler(labels)
        num_images = len(labels)
        objectness_loss, box_loss = objectness.new_zeros(()), objectness.new_zeros(())
        for number, (logits, delta) in enumerate(
            zip(objectness.view(num_images, -1), deltas.view(num_images, -1, 4), strict=True)
        ):
            sampled = positives[number] | negatives[number]
            objectness_loss += F.binary_cross_entropy_with_logits(
                logits[sampled], labels[number][sampled], reduction="sum"
            )
            positive = positives[number]
            box_loss += F.l1_loss(delta[positive], box_targets[number][positive], reduction="sum")
        scale = 1 / (RPN_SAMPLES * num_images)
        return proposals, {"loss_objectness": objectness_loss * scale, "loss_rpn_box": box_loss * scale}


def _named(maps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(number): feature_map for number, feature_map in enumerate(maps)}


def _box_losses(
    scores: tuple[torch.Tensor, ...],
    deltas: tuple[torch.Tensor, ...],
    labels: list[torch.Tensor],
    box_targets: tuple[torch.Tensor, ...],
) -> dict[str, torch.Tensor]:
    """Return the losses of the box head: cross entropy, and L1 of the positive proposals over all sampled ones."""
    class_losses, box_losses = [], []
    for score, delta, label, box_target in zip(scores, deltas, labels, box_targets, strict=True):
        num_sampled = max(len(label), 1)
        class_losses.append(F.cross_entropy(score, label, reduction="sum") / num_sampled)
        rows = torch.where(label > 0)[0]
        chosen = delta.view(len(label), -1, 4)[rows, label[rows]]
        box_losses.append(F.l1_loss(chosen, box_target[rows], reduction="sum") / num_sampled)
    return {"loss_class": torch.stack(class_losses).mean(), "loss_box": torch.stack(box_losses).mean()}


def _mask_loss(
    logits: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, matched: torch.Tensor, masks: torch.Tensor
) -> torch.Tensor:
    """Return the mean binary cross entropy of one image's positive proposals; 0 without any.

    Args:
        logits: (n, C, M, M). boxes: (n, 4). labels: (n,). matched: (n,) rows of masks. masks: uint8 (m, S, S).
    """
    if not len(logits):
        return logits.sum()  # 0, and every rank's backward pass reaches the mask head
    instances, rows = matched.unique(return_inverse=True)
    rois = torch.cat([rows[:, None].to(boxes.dtype), boxes], dim=1)
    side = logits.shape[-1]
    targets = roi_align(masks[instances][:, None].float(), rois, side, aligned=True)[:, 0] >= 0.5
    chosen = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(chosen, targets.to(chosen.dtype))


def _initialize(heads: Any) -> None:
    """Initialize the last layers as in detectron2."""
    nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.01)
    nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.001)
    nn.init.normal_(heads.mask_predictor.mask_fcn_logits.weight, std=0.001)
    linear = [module for module in heads.box_head if isinstance(module, nn.Linear)]
    for module in linear:
        nn.init.kaiming_uniform_(module.weight, a=1)
    layers = [*linear, heads.box_predictor.cls_score, heads.box_predictor.bbox_pred, *heads.mask_predictor]
    for module in layers:
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
