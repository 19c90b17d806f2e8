"""Semantic segmentation: a ViT with UperNet's heads, as in MAE's paper (He et al. 2022, Appendix A.4).

Invariant: the loss is a function of images, noise, label maps and weights. It is the mean over images of a per-image
loss, except that batch normalization combines the images of a micro batch (`distributed.sync_batch_norm`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.augment import photometric
from pipeline.data.label_maps import IGNORED
from pipeline.data.placement import Target
from pipeline.distributed.sync_batch_norm import SyncBatchNorm2d
from pipeline.models.drop_path import DropPath
from pipeline.models.relative_bias import add_relative_bias
from pipeline.models.trainable_module import LossOutput, TrainableModule
from pipeline.models.upernet import FCNHead, FeaturePyramid, UperNetHead
from pipeline.recipe.segmentation import SegmentationRecipe
from pipeline.tasks.finetune_task import meta_copy

NUM_MAPS = 4
"""Feature maps, from a third, half, two thirds and all of the blocks."""
AUXILIARY_MAP = 2


def feature_blocks(depth: int) -> list[int]:
    """Return the blocks, counted from 1, whose outputs are the feature maps: 4, 6, 8 and 12 of 12."""
    return [max(1, round(depth * third / 3)) for third in (1.0, 1.5, 2.0, 3.0)]


class Segmenter(TrainableModule):
    """Wrap a ViT, which is changed in place: it loses its final norm and gets relative positions.

    Args:
        vit: For images of the recipe's size.
        num_classes: Classes to predict.
    """

    def __init__(self, vit: VisionTransformer, num_classes: int, recipe: SegmentationRecipe) -> None:
        super().__init__()
        self.options, self.num_classes = recipe.segmenter, num_classes
        width, channels = vit.embed_dim, recipe.segmenter.channels or vit.embed_dim
        self._blocks = feature_blocks(len(vit.blocks))
        vit.norm = nn.Identity()
        if self.options.relative_positions:
            add_relative_bias(vit)
        self.drop_paths: list[DropPath] = []
        for number, block in enumerate(vit.blocks):
            rate = self.options.drop_path * number / max(len(vit.blocks) - 1, 1)
            block.drop_path1, block.drop_path2 = drop_paths = DropPath(rate), DropPath(rate)
            self.drop_paths += drop_paths
        vit.set_grad_checkpointing(recipe.engine.activation_checkpointing)
        self.vit = vit
        self.pyramid = FeaturePyramid(width, SyncBatchNorm2d)
        self.head = UperNetHead([width] * NUM_MAPS, channels, num_classes, SyncBatchNorm2d)
        self.auxiliary_head = FCNHead(width, self.options.auxiliary_channels, num_classes, SyncBatchNorm2d)
        dropped_channels = channels, self.options.auxiliary_channels
        self._noise_sizes = [photometric.NOISE_DIM, len(self.drop_paths), *dropped_channels]
        self.noise_size = sum(self._noise_sizes)
        # Not a buffer: the engine would round it to 16 bits.
        self._mean_std = torch.tensor([recipe.data.mean, recipe.data.std])[:, :, None, None]

    def forward(self, images: torch.Tensor, noise: torch.Tensor, targets: list[Target]) -> LossOutput:
        """Return the cross entropy of the head plus the weighted one of the auxiliary head.

        Args:
            images: (B, 3, S, S).
            noise: (B, noise_size).
            targets: Those of `data.label_maps.RandomScaleCrop`.
        """
        distortion, drop_path, *dropout = noise.split(self._noise_sizes, dim=1)
        labels = torch.stack([target["labels"] for target in targets]).long()
        if self.options.photometric:
            extents = torch.stack([target["extent"] for target in targets])
            images = self._distort(images.float(), distortion, extents)
        for layer, uniform in zip(self.drop_paths, drop_path.unbind(1), strict=True):
            layer.draw(uniform)
        rate = self.options.dropout
        scales = [(uniform >= rate) / (1 - rate) for uniform in dropout]
        loss, auxiliary = (_pixel_loss(logits, labels) for logits in self.all_logits(images, *scales))
        metrics = {"head_loss": loss.detach(), "auxiliary_loss": auxiliary.detach()}
        return LossOutput(loss + self.options.auxiliary_weight * auxiliary, metrics)

    def all_logits(
        self, images: torch.Tensor, scale: torch.Tensor | None = None, auxiliary_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (B, C, h, w) of both heads; the scales are their dropout (`UperNetHead.forward`)."""
        features = self._features(images)
        return self.head(features, scale), self.auxiliary_head(features[AUXILIARY_MAP], auxiliary_scale)

    @torch.no_grad()
    def predict_logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (B, C, S, S) of normalized images (B, 3, S, S)."""
        for layer in self.drop_paths:
            layer.keep = None
        with self._running_statistics():
            logits = self.head(self._features(images)).float()
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)

    def update_buffers(self, skipped: torch.Tensor) -> None:
        for module in self.modules():
            if isinstance(module, SyncBatchNorm2d):
                module.update_running_statistics(skipped)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return groups of layer-wise learning rates, as in BEiT's and MAE's code.

        The heads have the schedule's rate, the last block `layer_decay` times that, and so on.
        """
        no_decay = {"vit.cls_token", "vit.pos_embed"}
        no_decay |= {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return param_groups_layer_decay(self, weight_decay, no_decay, layer_decay=self.options.layer_decay)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Assign parameters to layers, for timm: embeddings, blocks, and the rest."""
        return {"stem": r"^vit\.(?:cls_token|pos_embed|patch_embed)", "blocks": [(r"^vit\.blocks\.(\d+)", None)]}

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        images = images.to(self.vit.patch_embed.proj.weight.dtype)
        indexes = sorted({block - 1 for block in self._blocks})
        maps = self.vit.forward_intermediates(images, indices=indexes, intermediates_only=True)
        by_block = dict(zip(indexes, maps, strict=True))
        return self.pyramid([by_block[block - 1] for block in self._blocks])

    def _distort(self, images: torch.Tensor, noise: torch.Tensor, extents: torch.Tensor) -> torch.Tensor:
        """Distort the colors of normalized images; what they do not cover stays 0."""
        self._mean_std = self._mean_std.to(images.device)
        mean, std = self._mean_std
        distorted = (photometric.distort((images * std + mean) * 255, noise) / 255 - mean) / std
        width, height = extents[:, :, None].unbind(1)
        x, y = (torch.arange(side, device=images.device) for side in (images.shape[3], images.shape[2]))
        covered = (y < height)[:, None, :, None] & (x < width)[:, None, None, :]
        return torch.where(covered, distorted, images)

    @contextmanager
    def _running_statistics(self) -> Iterator[None]:
        """Normalize by running statistics inside the block."""
        training = self.training
        self.eval()
        yield
        self.train(training)


def _pixel_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of logits (B, C, h, w), resized to labels (B, H, W), as a mean over all pixels.

    Unlabeled pixels add 0 to the sum but count as pixels, as in mmsegmentation. So it is a mean over images.
    """
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


def count_forward_flops(segmenter: Segmenter, side: int) -> int:
    """Count the floating-point operations of one image's forward pass, with both heads."""
    copied = meta_copy(segmenter).eval()
    assert isinstance(copied, Segmenter)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copied.all_logits(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops()
