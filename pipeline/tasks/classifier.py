"""Image classifier by the protocol of MAE's paper (He et al. 2022, Appendix A.1) and code.

The head is one linear layer on the normalized mean of the patch tokens.

Invariant: loss and stochastic depth depend on the images, labels and noise of a pair alone (see
`data.augment.mixup`); no random generator is used.
"""

from collections.abc import Iterator

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from pipeline.data.augment import mixup, rand_augment, random_erasing
from pipeline.models.block import LAYER_NORM_EPS
from pipeline.models.drop_path import DropPath
from pipeline.models.trainable_module import LossOutput, TrainableModule
from pipeline.recipe.classification import ClassificationRecipe

HEAD_STD = 2e-5


class Classifier(TrainableModule):
    """Wrap a ViT, which is changed in place: it gets a head, and its final norm moves behind the pooling.

    The ViT may be timm's Beit, which has the same interface.
    """

    def __init__(self, vit: VisionTransformer, num_classes: int, recipe: ClassificationRecipe) -> None:
        super().__init__()
        self.options, self.num_classes, self.uses_mixup = recipe.classifier, num_classes, recipe.uses_mixup
        self.crops = recipe.data.crops_per_image
        vit.norm, vit.fc_norm = nn.Identity(), nn.LayerNorm(vit.embed_dim, eps=LAYER_NORM_EPS)
        vit.global_pool = "avg"
        vit.head = nn.Linear(vit.embed_dim, num_classes)
        nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
        nn.init.zeros_(vit.head.bias)
        rates = torch.linspace(0, self.options.drop_path, len(vit.blocks)).tolist()
        self.drop_paths: list[DropPath] = []
        for block, rate in zip(vit.blocks, rates, strict=True):
            block.drop_path1, block.drop_path2 = drop_paths = DropPath(rate), DropPath(rate)
            self.drop_paths += drop_paths
        for module in vit.modules():  # transformers' weights may come with another one, which no run records
            if isinstance(module, nn.LayerNorm):
                module.eps = LAYER_NORM_EPS
        vit.set_grad_checkpointing(recipe.engine.activation_checkpointing)
        self.vit = vit
        parts = rand_augment, random_erasing, mixup
        self._noise_sizes = [*(part.NOISE_DIM for part in parts), len(self.drop_paths)]
        self.noise_size = sum(self._noise_sizes)
        # Not a buffer: the engine would round it to 16 bits.
        self._mean_std = torch.tensor([recipe.data.mean, recipe.data.std])[:, :, None, None]

    def forward(self, images: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor) -> LossOutput:
        """Return the mean cross entropy with mixed, smoothed targets; labels are int64 (B,)."""
        augment_noise, erasing_noise, mixup_noise, drop_noise = noise.split(self._noise_sizes, dim=1)
        with torch.no_grad():
            images = self._augment(images.float(), augment_noise, erasing_noise)
            smoothing = self.options.label_smoothing
            targets = F.one_hot(labels, self.num_classes) * (1 - smoothing) + smoothing / self.num_classes
            if self.uses_mixup:
                alphas = self.options.mixup, self.options.cutmix
                images, targets = mixup.mixup_cutmix(images, targets, mixup_noise, *alphas, self.crops)
        for drop_path, uniform in zip(self.drop_paths, drop_noise.unbind(1), strict=True):
            drop_path.draw(uniform)
        loss = -(targets * self.compute_logits(images).log_softmax(dim=1)).sum(dim=1).mean()
        return LossOutput(loss, {})

    def compute_logits(self, images: torch.Tensor) -> torch.Tensor:
        """Classify augmented images (B, 3, H, W); returns float32 logits (B, C)."""
        return self.vit(images.to(self.vit.patch_embed.proj.weight.dtype)).float()

    @torch.no_grad()
    def predict_logits(self, images: torch.Tensor) -> torch.Tensor:
        """Classify images (B, 3, H, W) without augmentation; returns float32 logits (B, C)."""
        for drop_path in self.drop_paths:
            drop_path.keep = None
        return self.compute_logits(images)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return timm's groups of layer-wise learning rates, as in MAE's code.

        The head has the schedule's rate, each block `layer_decay` times that of the next one.
        """
        no_decay = self.vit.no_weight_decay()
        groups = param_groups_layer_decay(self.vit, weight_decay, no_decay, layer_decay=self.options.layer_decay)
        frozen = {id(parameter) for parameter in self._frozen_parameters()}
        for group in groups:  # a group has parameters of one block
            if id(group["params"][0]) in frozen:
                group["lr_scale"] = 0.0
        return groups

    def _frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that `trained_blocks` excludes: embeddings and the first blocks.

        Their learning rate is 0. Without gradients they would be no part of the optimizer, and of the checkpoints.
        """
        if self.options.trained_blocks is None:
            return
        num_frozen = len(self.vit.blocks) - self.options.trained_blocks
        embeddings = "cls_token", "pos_embed", "rel_pos_bias.", "patch_embed."
        prefixes = *embeddings, *(f"blocks.{index}." for index in range(num_frozen))
        for name, parameter in self.vit.named_parameters():
            if name.startswith(prefixes):
                yield parameter

    def _augment(self, images: torch.Tensor, augment_noise: torch.Tensor, erasing_noise: torch.Tensor) -> torch.Tensor:
        options = self.options
        if options.rand_augment is not None:
            self._mean_std = self._mean_std.to(images.device)
            mean, std = self._mean_std
            levels = ((images * std + mean) * 255).round().clamp(0, 255)
            strength = options.rand_augment, options.rand_augment_deviation
            levels = rand_augment.rand_augment(levels, augment_noise, *strength, (mean * 255).round())
            images = (levels / 255 - mean) / std
        return random_erasing.erase(images, erasing_noise, options.erasing)
