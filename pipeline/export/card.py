"""The model card: README.md of an export, filled from the run.

Invariant: everything on it was recorded by the run or measured by the export. What nobody recorded is a line
that says so, for a person to fill in.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import yaml

from pipeline.errors import UserError
from pipeline.export.target import Target
from pipeline.recipe import Recipe
from pipeline.report.history import METRICS, logged
from pipeline.trained import Trained

PAPERS = {
    "mae": ("MAE", "https://arxiv.org/abs/2111.06377"),
    "emae": ("EMAE", "https://arxiv.org/abs/2302.14431"),
    "efficient_mae": ("Efficient MAE", "Han et al., WACV 2024"),
    "lomar": ("LoMaR", "https://arxiv.org/abs/2206.00790"),
}
LICENCE_OF = dict.fromkeys(("openimages", "coco"), "each image's own, in its sample's json")
NOT_RECORDED = "not recorded: **to be filled in**"
CARD = Template("""\
---
tags: [$tags]
---
# $title

$summary

## Use

```python
$usage
```

Images are RGB, from 0 to 1, less the mean $mean, over the standard deviation $std, $size x $size px.

## Data

$data

## Training

$training

<details><summary>The recipe</summary>

```yaml
$recipe
```

</details>

## Compute

$compute

## Results

$results

## Check

Loaded again by the library it is for, its features differ from the trained model's by at most $difference
of the largest, in fp32.

## Licence

Licence of these weights: **to be filled in** by whoever publishes them; the data's terms may bind it.
""")


class Spent(NamedTuple):
    """What the steps up to the exported one took."""

    images: int
    hours: float
    """Of training steps; without starts, checkpoints, and steps trained again after an interruption."""
    device_hours: float
    """The same, times the number of ranks."""


def recorded(
    run: Path, trained: Trained, target: Target, ema: bool, results: Sequence[Path] = ()
) -> dict[str, str]:
    """What README.md says before the export is checked. ema: the weights are their moving average. results:
    files of JSON to quote. UserError where one, or what the run wrote, cannot be read."""
    recipe = trained.recipe
    environment = _read(run / "environment.json") if (run / "environment.json").is_file() else {}
    name, paper = PAPERS[recipe.method.name]
    return dict(
        tags=", ".join([*target.tags, "vit", "masked-image-modeling", recipe.method.name]),
        title=f"{recipe.model.name}, patch {recipe.model.patch_size}, {recipe.data.image_size} px, {name}",
        summary=f"A vision transformer, pre-trained without labels by {name} ({paper}).",
        usage=target.usage(recipe).strip(),
        mean=str(list(recipe.data.mean)),
        std=str(list(recipe.data.std)),
        size=str(recipe.data.image_size),
        data=_data(environment.get("data")),
        training=_training(recipe, trained.step, ema),
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).strip(),
        compute=_compute(run, environment, trained.step),
        results=_results(results),
    )


def card(found: dict[str, str], difference: float) -> str:
    """The text of README.md: what was `recorded`, and what the check measured."""
    return CARD.substitute(found, difference=f"{difference:.1e}")


def spent(lines: list[dict], starts: list[dict], step: int) -> Spent:
    """lines: of metrics.jsonl; starts: of environment.json. Up to `step`."""
    done = [line for line in lines if "images_per_s" in line and line["step"] <= step]
    images = hours = device_hours = 0
    for line in done:
        took = (line["samples"] - images) / line["images_per_s"] / 3600
        ranks = [start["world_size"] for start in starts if start["step"] < line["step"]]
        images, hours = line["samples"], hours + took
        device_hours += took * (ranks[-1] if ranks else 1)
    return Spent(images, hours, device_hours)


def _table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _data(sets: list[dict] | None) -> str:
    if not sets:
        return f"Data sets: {NOT_RECORDED}."
    lines = ["| set | source | split | images | licence |", "| --- | --- | --- | --- | --- |"]
    for entry in sets:
        licence = LICENCE_OF.get(entry["source"], NOT_RECORDED)
        name = Path(entry["path"]).name
        lines.append(f"| {name} | {entry['source']} | {entry['split']} | {entry['samples']:,} | {licence} |")
    return "\n".join(lines)


def _training(recipe: Recipe, step: int, ema: bool) -> str:
    size, optim = recipe.model.size, recipe.optim
    optimiser = {"adamw": "AdamW", "muon": "Muon and AdamW"}[optim.name]
    return _table(
        {
            "encoder": f"{size.depth} layers, {size.width} wide, {size.heads} heads",
            "weights": f"moving average, decay {recipe.train.ema_decay}" if ema else "of the last step",
            "steps": f"{step:,}, a batch of {recipe.data.global_batch:,} images each",
            "optimiser": f"{optimiser}, betas {list(optim.betas)}, weight decay {optim.weight_decay}",
            "learning rate": f"{recipe.lr:.3g} at its peak, then a cosine",
            "precision": recipe.engine.precision,
            "targets": "pixels, normalised per patch" if recipe.method.normalize_targets else "pixels",
            "random seed": recipe.seed,
        }
    )


def _compute(run: Path, environment: dict, step: int) -> str:
    lines = logged(run) if (run / METRICS).is_file() else []
    starts = environment.get("starts", [])
    total = spent(lines, starts, step)
    if not total.images:
        return f"Compute: {NOT_RECORDED}."
    versions = ", ".join(f"{name} {number}" for name, number in environment.get("versions", {}).items())
    devices = dict.fromkeys(f"{start['world_size']} x {start['device']}" for start in starts)
    return _table(
        {
            "devices": "; then ".join(devices) or NOT_RECORDED,
            "device hours": f"{total.device_hours:.3g} ({total.hours:.3g} h of training steps; starts, "
            "checkpoints and steps trained twice are not counted)",
            "images": f"{total.images:,}",
            "images/s": f"{total.images / total.hours / 3600:,.0f}",
            "versions": versions or NOT_RECORDED,
            "commit": environment.get("commit") or NOT_RECORDED,
        }
    )


def _results(results: Sequence[Path]) -> str:
    if not results:
        return f"Results: {NOT_RECORDED}."
    texts = {path: json.dumps(_read(path), indent=1) for path in results}
    return "\n\n".join(f"{path.name}:\n\n```json\n{text}\n```" for path, text in texts.items())


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no JSON that can be read: {error}") from None
