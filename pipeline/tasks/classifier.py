"""An encoder with a head that learns classes, by the protocol of MAE's paper (He et al. 2022, Appendix A.1)
and official code: the mean of the patch tokens, normalised, and one linear layer.

Invariant: what an image's loss is, and which of its blocks are skipped, follows from the images, labels and
noise of its pair (see `augment.mixing`) alone. The generator of a rank or a device is never asked.
"""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from pipeline.data.augment import mixup, rand_augment, random_erasing
from pipeline.models.block import LAYER_NORM_EPS
from pipeline.models.module import TrainableModule
from pipeline.recipe.finetune import FinetuneRecipe

HEAD_STD = 2e-5


class ClassifierOutput(NamedTuple):
    loss: torch.Tensor
    """float32 scalar: the mean over images of the cross entropy with mixed, smoothed targets."""
    metrics: dict[str, torch.Tensor]


class Skip(nn.Module):
    """Stochastic depth (Huang et al. 2016) of one branch: `keep` is told from outside, by the noise."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.keep = rate, None

    def draw(self, numbers: torch.Tensor) -> None:
        """numbers (B,) in [0, 1), one an image, for the next forward."""
        self.keep = ((numbers >= self.rate) / (1 - self.rate))[:, None, None]

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        return branch if self.keep is None else branch * self.keep.to(branch.dtype)


class Classifier(TrainableModule):
    """Classes from images. `vit` is changed: it gets a head, and its own norm becomes the head's."""

    def __init__(self, vit: VisionTransformer, num_classes: int, recipe: FinetuneRecipe) -> None:
        super().__init__()
        self.options, self.num_classes, self.mixes = recipe.classifier, num_classes, recipe.mixes
        self.crops = recipe.data.crops_per_image
        vit.norm, vit.fc_norm = nn.Identity(), nn.LayerNorm(vit.embed_dim, eps=LAYER_NORM_EPS)
        vit.global_pool = "avg"
        vit.head = nn.Linear(vit.embed_dim, num_classes)
        nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
        nn.init.zeros_(vit.head.bias)
        rates = torch.linspace(0, self.options.drop_path, len(vit.blocks)).tolist()
        for block, rate in zip(vit.blocks, rates, strict=True):
            block.drop_path1, block.drop_path2 = Skip(rate), Skip(rate)
        vit.set_grad_checkpointing(recipe.engine.activation_checkpointing)
        self.vit = vit
        self.skips = [module for block in vit.blocks for module in (block.drop_path1, block.drop_path2)]
        self._parts = [rand_augment.NOISE_DIM, random_erasing.NOISE_DIM, mixup.NOISE_DIM, len(self.skips)]
        self.noise_size = sum(self._parts)
        # No buffer, which an engine in 16 bits would round.
        self._mean_std = torch.tensor([recipe.data.mean, recipe.data.std])[:, :, None, None]

    def forward(self, images: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor) -> ClassifierOutput:
        of_augment, of_erasing, of_mixing, of_skips = noise.split(self._parts, dim=1)
        with torch.no_grad():
            images = self._augmented(images.float(), of_augment, of_erasing)
            smooth = self.options.label_smoothing
            targets = F.one_hot(labels, self.num_classes) * (1 - smooth) + smooth / self.num_classes
            if self.mixes:
                alphas = self.options.mixup, self.options.cutmix
                images, targets = mixup.mixup_cutmix(images, targets, of_mixing, *alphas, self.crops)
        for skip, numbers in zip(self.skips, of_skips.unbind(1), strict=True):
            skip.draw(numbers)
        loss = -(targets * self._logits(images).log_softmax(dim=1)).sum(dim=1).mean()
        return ClassifierOutput(loss, {})

    @torch.no_grad()
    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W), not augmented -> logits (B, C), float32."""
        for skip in self.skips:
            skip.keep = None
        return self._logits(images)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """timm's groups of layer-wise learning rates, which are MAE's: the head learns at the schedule's
        rate, every block at `layer_decay` times that of the next one."""
        fixed = self.vit.no_weight_decay()
        return param_groups_layer_decay(self.vit, weight_decay, fixed, layer_decay=self.options.layer_decay)

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.vit(images.to(self.vit.patch_embed.proj.weight.dtype)).float()

    def _augmented(
        self, images: torch.Tensor, of_augment: torch.Tensor, of_erasing: torch.Tensor
    ) -> torch.Tensor:
        options = self.options
        if options.rand_augment is not None:
            self._mean_std = self._mean_std.to(images.device)
            mean, std = self._mean_std
            levels = ((images * std + mean) * 255).round().clamp(0, 255)
            strength = options.rand_augment, options.rand_augment_deviation
            levels = rand_augment.rand_augment(levels, of_augment, *strength, (mean * 255).round())
            images = (levels / 255 - mean) / std
        return random_erasing.erase(images, of_erasing, options.erasing)
