"""Patch features as colours: their three main directions as red, green and blue.

Patches of one colour have features in one direction. The directions are those of all photographs together, so
a colour means the same in each; beside it those of each photograph alone, which show what differs inside it.
"""

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipeline.pictures.canvas import Column, enlarged, render_grid
from pipeline.pictures.images import to_pixels
from pipeline.recipe.sections import DataSection
from pipeline.weights.encoder import ImageEncoder


def plot_features(encoder: ImageEncoder, data: DataSection, batch: torch.Tensor) -> tuple[Image.Image, str]:
    """Colours of the patches of photographs (B, 3, S, S) of the encoder's image size; and what they explain
    of the features, in a sentence."""
    with torch.inference_mode():
        each = [encoder(one)[:, 1:] for one in tqdm(batch.split(1), "features", delay=5, leave=False)]
        features = torch.cat(each)
    together, share = main_directions(features.flatten(0, 1))
    alone = torch.stack([main_directions(one)[0] for one in features])
    grid, side = encoder.image_size // encoder.patch_size, batch.shape[-1]
    columns = [Column("original", to_pixels(batch, data))]
    for title, values in (("features, together", together), ("features, each alone", alone)):
        colours = as_colours(values.reshape(len(batch), grid * grid, 3), of_each=values is alone)
        columns.append(Column(title, enlarged(colours.reshape(-1, grid, grid, 3), side)))
    sentence = f"three directions hold {share:.0%} of the variance of {features.shape[-1]}"
    caption = (
        f"{encoder.name}, {side} px. The last layer's patch features, their three main directions (PCA) as "
        f"red, green and blue: of all photographs together ({sentence}), and of each alone."
    )
    return render_grid(columns, caption), sentence


def main_directions(features: torch.Tensor) -> tuple[torch.Tensor, float]:
    """features (N, D) -> their three principal components (N, 3), and the share of the variance that they
    hold. The sign of each is such that its skewness is positive, so a picture does not depend on chance."""
    centred = (features - features.mean(dim=0)).double()
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    components = centred @ directions[:3].T
    sign = components.pow(3).sum(dim=0).sign()
    return (components * torch.where(sign == 0, 1, sign)).float(), (
        values[:3].square().sum() / values.square().sum()
    ).item()


def as_colours(components: torch.Tensor, of_each: bool) -> np.ndarray:
    """(B, L, 3) to uint8 (B, L, 3): the 1st to the 99th percentile of each, of each photograph or of all, is
    0 to 255."""
    flat = components if of_each else components.flatten(0, 1)[None]
    low, high = (flat.quantile(q, dim=1, keepdim=True) for q in (0.01, 0.99))
    share = (components - low) / (high - low).clamp(min=1e-12)
    return (share.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
