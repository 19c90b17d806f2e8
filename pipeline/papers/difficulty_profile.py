"""Figure 2 of Efficient MAE: masked patches by P2Dist, and their share of the loss with and without d^-gamma."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data.reader import ShardReader
from pipeline.difficulty import patch_distance
from pipeline.io.atomic import atomic_path, atomic_write, write_json
from pipeline.papers.experiment import Experiment
from pipeline.papers.report import format_notes, markdown_row
from pipeline.pictures.difficulty_map import masked_errors
from pipeline.pictures.images import load_first_images
from pipeline.pictures.reconstruction import reconstruct_tiles
from pipeline.recipe import Recipe
from pipeline.recipe.mask_statistics import sample_difficulties
from pipeline.weights.run import load_run

INTERVALS_PER_PATCH = 2
"""Intervals of P2Dist per patch side: 8 px at patch size 16."""
MAX_PATCHES = 4
"""The last interval begins at this distance, in patch sides, and has no upper end."""
NUM_IMAGES = 64
"""Images whose errors are averaged."""


class Profile(NamedTuple):
    """Values per interval of P2Dist."""

    low: list[float]
    """Lower ends in pixels."""
    patches: dict[float, list[float]]
    """Masked patches per image, for each mask ratio."""
    loss_share: list[float]
    """Share of MAE's loss in %, at the row's mask ratio."""
    flattened_share: list[float]
    """The same with weights d^-gamma."""
    has_errors: bool
    """Whether the loss is that of a trained model. Otherwise every patch has the same error."""


def write(
    experiment: Experiment,
    recipe: Recipe,
    directory: Path,
    run: Path | None,
    data: str | None,
    overrides: Sequence[str],
) -> Path:
    """Write DIR/NAME.json, NAME.md and NAME.png. Returns the Markdown file.

    Args:
        recipe: MAE's, which gives the geometry; gamma is that of method.efficient_mae.
        run: Run directory of a trained MAE; None: assume the same error for every patch.
        data: Shard set of the images to reconstruct, if there is a run.
    """
    profile = compute_profile(recipe, experiment.profile, run, data)
    write_json(directory / f"{experiment.name}.json", {"experiment": experiment.name, **profile._asdict()})
    _plot(profile, recipe, directory / f"{experiment.name}.png")
    titles = [f"patches at {ratio}" for ratio in profile.patches]
    titles = ["P2Dist, px, from", *titles, "share of the loss, %", f"with d^-{recipe.method.efficient_mae.gamma:g}, %"]
    columns = [profile.low, *profile.patches.values(), profile.loss_share, profile.flattened_share]
    rows = [[f"{value:.1f}" for value in row] for row in zip(*columns, strict=True)]
    lines = [f"# {experiment.name}: {experiment.title}", "", f"Published: {experiment.source}.", ""]
    lines += [markdown_row(titles), markdown_row(["---"] * len(titles)), *map(markdown_row, rows)]
    path = directory / f"{experiment.name}.md"
    atomic_write(path, "\n".join([*lines, *format_notes(experiment, overrides)]) + "\n")
    return path


def compute_profile(
    recipe: Recipe, mask_ratios: tuple[float, ...], run: Path | None = None, data: str | None = None
) -> Profile:
    """Compute the profile; the arguments are those of `write`."""
    patch, grid = recipe.model.patch_size, recipe.grid
    width, count = patch / INTERVALS_PER_PATCH, INTERVALS_PER_PATCH * MAX_PATCHES + 1
    options = recipe.method.efficient_mae

    def histogram(distance: torch.Tensor, weight: torch.Tensor | None = None) -> np.ndarray:
        index = (distance / width).long().clamp(max=count - 1).flatten()
        return torch.bincount(index, None if weight is None else weight.flatten(), count).double().numpy()

    patches = {}
    for ratio in mask_ratios:
        distance = sample_difficulties(
            grid, int(grid**2 * (1 - ratio)), patch, "p2dist", num_nearest=options.num_nearest
        )
        patches[ratio] = (histogram(distance) / len(distance)).tolist()
    distance = sample_difficulties(grid, recipe.num_visible, patch, "p2dist", num_nearest=options.num_nearest)
    error = torch.ones_like(distance)
    if run:
        assert data is not None
        distance, error = _errors_of_run(run, data, options.num_nearest)
    shares = [histogram(distance, error * distance**-gamma) for gamma in (0.0, options.gamma)]
    plain, flattened = ((100 * share / share.sum()).tolist() for share in shares)
    low = [number * width for number in range(count)]
    return Profile(low, patches, plain, flattened, run is not None)


def _errors_of_run(run: Path, data: str, num_nearest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return P2Dist and error of the masked patches of the first images of a shard set: two (n,)."""
    recipe, method, _ = load_run(run)
    images = load_first_images(ShardReader(data, recipe.data), NUM_IMAGES, recipe.data)
    _, result = reconstruct_tiles(method, images, recipe.seed)
    visible = result.visible.view(-1, recipe.grid, recipe.grid)
    distance = patch_distance(visible, recipe.model.patch_size, k=num_nearest).flatten()
    error = masked_errors(result, images, recipe).flatten()
    is_masked = ~visible.flatten()
    return distance[is_masked], error[is_masked]


def _plot(profile: Profile, recipe: Recipe, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for ratio, counts in profile.patches.items():
        upper.plot(profile.low, counts, marker="o", label=f"mask ratio {ratio}")
    upper.set_ylabel("masked patches per image")
    gamma = recipe.method.efficient_mae.gamma
    lower.plot(profile.low, profile.loss_share, marker="o", label="MAE")
    lower.plot(profile.low, profile.flattened_share, marker="o", label=f"with $d^{{-{gamma:g}}}$")
    assumed = "" if profile.has_errors else ", equal errors"
    lower.set_ylabel(f"share of the loss, %{assumed}")
    lower.set_xlabel("P2Dist, pixels (lower end of the interval)")
    for panel in (upper, lower):
        panel.grid(alpha=0.3)
        panel.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
