"""Add a task: predict by how many quarter turns an image was rotated (Gidaris et al., ICLR 2018)."""

import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from pipeline.data.reader import ShardReader
from pipeline.models.trainable_module import LossOutput, TrainableModule
from pipeline.recipe import Recipe, load_recipe
from pipeline.train.run_directory import RunDirectory
from pipeline.train.task import Task
from pipeline.train.trainer import Trainer


class RotationModel(TrainableModule):
    """Rotate each image by a random number of quarter turns and predict that number."""

    noise_size = 1

    def __init__(self, recipe: Recipe):
        super().__init__()
        image, patch, (width, depth, heads) = recipe.data.image_size, recipe.model.patch_size, recipe.model.size
        self.vit = VisionTransformer(image, patch, num_classes=4, embed_dim=width, depth=depth, num_heads=heads)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> LossOutput:
        turns = (4 * noise[:, 0]).long()  # (B,)
        rotated = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])  # (4, B, 3, H, W)
        logits = self.vit(rotated[turns, torch.arange(len(images), device=images.device)]).float()  # (B, 4)
        accuracy = (logits.argmax(dim=1) == turns).float().mean()
        return LossOutput(F.cross_entropy(logits, turns), {"rotation_top1": accuracy.detach()})


class RotationTask(Task[Recipe]):
    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @property
    def description(self) -> str:
        return "rotation prediction"

    def build(self, reader: ShardReader) -> RotationModel:
        return RotationModel(self.recipe)

    def forward_flops(self) -> float:
        return 0.0  # unknown, so that metrics.jsonl has no MFU


if __name__ == "__main__":
    data, run, *overrides = sys.argv[1:]
    Trainer(RotationTask(load_recipe("demo_emae", overrides)), [data], RunDirectory(Path(run))).train()
