"""Detector: ViTDet's backbone and Mask R-CNN, with the optimizer's groups of detectron2's ViTDet.

Invariant: the loss depends on the images, targets and noise alone; no random generator is used.
"""

import re
from typing import Any

import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.drop_path import DropPath
from pipeline.models.mask_rcnn import BOX_SIZE, MASK_SIZE, NUM_KEYS, MaskRCNN
from pipeline.models.trainable_module import LossOutput, TrainableModule
from pipeline.models.vitdet import SimpleFeaturePyramid, build_vitdet, vitdet_state_dict
from pipeline.recipe.detection import DetectionRecipe
from pipeline.weights.encoder import ImageEncoder

POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")


class Detector(TrainableModule):
    """Maps images and targets to a loss, and images to detections.

    Args:
        vit: From `build_vitdet`.
        num_classes: Without the background.
    """

    def __init__(self, vit: VisionTransformerSAM, num_classes: int, recipe: DetectionRecipe) -> None:
        super().__init__()
        self.options = options = recipe.detector
        vit.set_grad_checkpointing(recipe.engine.activation_checkpointing)
        self.vit = vit
        self.pyramid = SimpleFeaturePyramid(vit.embed_dim, options.width)
        self.heads = MaskRCNN(
            num_classes,
            options.patch_size,
            options.width,
            options.head_convs,
            options.fc_width,
            options.samples_per_image,
        )
        self._drop_paths = [module for module in vit.modules() if isinstance(module, DropPath)]
        self.noise_size = NUM_KEYS + len(self._drop_paths)

    def forward(self, images: torch.Tensor, noise: torch.Tensor, targets: list[dict[str, Any]]) -> LossOutput:
        """Return the sum of the losses, and each by name; the targets are those of `MaskRCNN.compute_losses`."""
        for drop_path, uniform in zip(self._drop_paths, noise[:, NUM_KEYS:].unbind(1), strict=True):
            drop_path.draw(uniform)
        losses = self.heads.compute_losses(self.compute_features(images), images, targets, noise[:, :NUM_KEYS])
        loss = torch.stack(list(losses.values())).sum()
        return LossOutput(loss, {name: value.detach() for name, value in losses.items()})

    @torch.no_grad()
    def detect(self, images: torch.Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
        """Return the detections of each image; see `MaskRCNN.detect`."""
        for drop_path in self._drop_paths:
            drop_path.keep = None
        return self.heads.detect(self.compute_features(images), images, sizes)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return a group for each layer of the ViT, with its learning rate, and one for the rest.

        As in detectron2's ViTDet, a block's rate is `layer_decay` times that of the next one, the last block's
        `layer_decay` times that of pyramid and heads, and norms and positions are not decayed.
        """
        depth, decay = len(self.vit.blocks), self.options.layer_decay
        norms = {id(p) for module in self.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            is_decayed = id(parameter) not in norms and not name.endswith(POSITIONS)
            groups.setdefault((_layer_of(name, depth), is_decayed), []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": weight_decay if is_decayed else 0.0,
                "lr_scale": decay ** (depth + 1 - layer),
            }
            for (layer, is_decayed), parameters in groups.items()
        ]

    def compute_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Map images (B, 3, S, S) to the maps of the feature pyramid."""
        # Calls modules, not their methods: with ZeRO-3, a call gathers the module's parameters.
        return self.pyramid(self.vit(images.to(next(self.parameters()).dtype)))


def _layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter: 0 for the embedding, 1 to `depth` for blocks, then `depth + 1`."""
    if name.startswith(("vit.pos_embed", "vit.patch_embed")):
        return 0
    block = re.match(r"vit\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def build_detector(width: int, depth: int, heads: int, num_classes: int, recipe: DetectionRecipe) -> Detector:
    """Build a detector with random weights for an encoder of this size."""
    options = recipe.detector
    size = recipe.data.image_size
    vit = build_vitdet(width, depth, heads, options.patch_size, size, options.window_size, options.drop_path)
    return Detector(vit, num_classes, recipe)


def detector_from_encoder(encoder: ImageEncoder, num_classes: int, recipe: DetectionRecipe) -> Detector:
    """Build a detector whose ViT has an encoder's weights; relative positions start at zero."""
    detector = build_detector(encoder.width, len(encoder.vit.blocks), encoder.heads, num_classes, recipe)
    state = vitdet_state_dict(encoder.vit, recipe.detector.patch_size, recipe.data.image_size)
    missing, unexpected = detector.vit.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith(POSITIONS[1:]) for name in missing), (missing, unexpected)
    return detector


def training_forward_flops(detector: Detector, recipe: DetectionRecipe) -> int:
    """Count the FLOPs of one image's forward pass in training, of a detector on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_networks(detector, recipe, batch=1)
    return counter.get_total_flops()


def run_networks(detector: Detector, recipe: DetectionRecipe, batch: int) -> None:
    """Run the parts with weights of a detector on the meta device, on as many proposals as in training.

    A quarter of the sampled proposals are positive, the most that there can be, and have masks.
    """
    size, options, heads = recipe.data.image_size, recipe.detector, detector.heads
    roi_heads: Any = heads.roi_heads
    sampled = batch * options.samples_per_image
    with torch.device("meta"):
        maps = detector.compute_features(torch.empty(batch, 3, size, size))
        boxes = maps[0].new_empty(sampled, options.width, BOX_SIZE, BOX_SIZE)
        masks = maps[0].new_empty(sampled // 4, options.width, MASK_SIZE, MASK_SIZE)
        heads.rpn.head(maps)
        roi_heads.box_predictor(roi_heads.box_head(boxes))
        roi_heads.mask_predictor(roi_heads.mask_head(masks))
