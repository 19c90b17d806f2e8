"""Patch features as colors: their three principal components as red, green and blue.

Components are computed over all images together, so that a color means the same in each, and over each image alone,
which shows the differences within it.
"""

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipeline.pictures.canvas import Column, render_grid, upscale
from pipeline.pictures.images import to_pixels
from pipeline.recipe.sections import DataSection
from pipeline.weights.encoder import ImageEncoder


def plot_features(encoder: ImageEncoder, data: DataSection, batch: torch.Tensor) -> tuple[Image.Image, str]:
    """Color the patches of images (B, 3, S, S) of the encoder's size; return picture and explained variance."""
    with torch.inference_mode():
        images = tqdm(batch.split(1), "features", delay=5, leave=False, disable=None)
        features = torch.cat([encoder(one)[:, 1:] for one in images])
    joint, share = principal_components(features.flatten(0, 1))
    joint = joint.reshape(len(batch), -1, 3)
    separate = torch.stack([principal_components(one)[0] for one in features])
    grid, side = encoder.image_size // encoder.patch_size, batch.shape[-1]
    columns = [Column("original", to_pixels(batch, data))]
    for title, values in (("features, all images", joint), ("features, each alone", separate)):
        colors = to_colors(values, per_image=values is separate)
        columns.append(Column(title, upscale(colors.reshape(-1, grid, grid, 3), side)))
    summary = f"three components explain {share:.0%} of the variance of {features.shape[-1]}"
    caption = (
        f"{encoder.name}, {side} px. Three principal components of the last layer's patch features as red, green "
        f"and blue, over all images ({summary}) and over each alone."
    )
    return render_grid(columns, caption), summary


def principal_components(features: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Project features (N, D) on their first three principal components.

    Returns:
        (N, 3), with the sign that makes the skewness positive, so that colors are deterministic; and the share
        of the variance that they explain.
    """
    centered = (features - features.mean(dim=0)).double()
    _, values, directions = torch.linalg.svd(centered, full_matrices=False)
    components = centered @ directions[:3].T
    sign = components.pow(3).sum(dim=0).sign()
    components = (components * torch.where(sign == 0, 1, sign)).float()
    return components, (values[:3].square().sum() / values.square().sum()).item()


def to_colors(components: torch.Tensor, per_image: bool) -> np.ndarray:
    """Scale (B, L, 3) to uint8: the 1st to 99th percentile, of each image or of all, becomes 0 to 255."""
    samples = components if per_image else components.flatten(0, 1)[None]
    low, high = (samples.quantile(q, dim=1, keepdim=True) for q in (0.01, 0.99))
    share = (components - low) / (high - low).clamp(min=1e-12)
    return (share.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
