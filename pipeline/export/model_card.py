"""The model card: README.md of an export, filled from the run.

Invariant: every statement was recorded by the run or measured by the export; what is unknown is marked to be
filled in.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

from pipeline.errors import UserError
from pipeline.evals.accuracy import Accuracy
from pipeline.export.formats import Exportable, ExportFormat
from pipeline.io.atomic import read_json
from pipeline.report.history import read_metrics_log
from pipeline.tasks.loaded_classifier import LoadedClassifier
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.run import LoadedRun

PAPERS = {
    "mae": ("MAE", "https://arxiv.org/abs/2111.06377"),
    "emae": ("EMAE", "https://arxiv.org/abs/2302.14431"),
    "efficient_mae": ("Efficient MAE", "Han et al., WACV 2024"),
    "lomar": ("LoMaR", "https://arxiv.org/abs/2206.00790"),
    "beit": ("BEiT", "https://arxiv.org/abs/2106.08254"),
}
TARGETS = {
    "pixels": "pixels",
    "normalized_pixels": "pixels, normalized per patch",
    "pca": "principal components of pixels",
    "hog": "histograms of oriented gradients",
    "tokens": "visual tokens of a discrete VAE",
}
SOURCE_LICENSES = dict.fromkeys(("openimages", "coco"), "per image, in its sample's json")
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

Images are RGB in [0, 1], normalized with mean $mean and std $std. Evaluation resizes the shorter side to
$resize px (bicubic) and crops the center, $size x $size px.

## Data

$data

## Training

$training

<details><summary>Recipe</summary>

```yaml
$recipe
```

</details>

## Compute

$compute

## Results

$results

## Verification

Outputs of the model reloaded with its target library differ from the trained model's by at most $difference
of the largest output, in fp32.

## License

License of these weights: **to be filled in** by the publisher; the terms of the data may restrict it.
""")


class Compute(NamedTuple):
    """Cost of the steps up to the exported one."""

    images: int
    hours: float
    """Hours of training steps, without start-up, checkpoints and repeated steps."""
    device_hours: float
    """Hours times world size."""


class Description(NamedTuple):
    title: str
    summary: str
    tags: tuple[str, ...]
    options: dict[str, object]
    """Rows of the training table."""


def card_fields(
    run: Path, loaded: Exportable, export_format: ExportFormat[Any], ema: bool, results: Sequence[Path] = ()
) -> dict[str, str]:
    """Return the fields of the card that are known before the export is verified.

    Args:
        run: Run directory.
        loaded: The run's model.
        export_format: The format of the export.
        ema: Whether the weights are their moving average.
        results: JSON files to quote.

    Raises:
        UserError: If one of `results` or a file of the run cannot be read.
    """
    vit, data, directory = loaded.vit, loaded.recipe.data, RunDirectory(run)
    environment = read_json(directory.environment) if directory.environment.is_file() else {}
    quotes = [f"{path.name}:\n\n```json\n{json.dumps(read_json(path), indent=1)}\n```" for path in results]
    if isinstance(loaded, LoadedClassifier):
        title, summary, tags, options = _describe_classifier(loaded)
        quotes.insert(0, _accuracy_table(directory, ema))
    else:
        title, summary, tags, options = _describe_encoder(loaded)
    return dict(
        tags=", ".join([*export_format.tags, "vit", *tags]),
        title=title,
        summary=summary,
        usage=export_format.usage(loaded).strip(),
        mean=str(list(data.mean)),
        std=str(list(data.std)),
        size=str(data.image_size),
        resize=str(vit.resize),
        data=_data_table(environment.get("data")),
        training=_training_table(loaded, ema, options),
        recipe=yaml.safe_dump(loaded.recipe.model_dump(mode="json"), sort_keys=False).strip(),
        compute=_compute_table(directory, environment, loaded.step),
        results="\n\n".join(quotes) or f"Results: {NOT_RECORDED}.",
    )


def render_card(fields: dict[str, str], difference: float) -> str:
    """Return the text of README.md."""
    return CARD.substitute(fields, difference=f"{difference:.1e}")


def training_compute(lines: list[dict], starts: list[dict], step: int) -> Compute:
    """Sum the cost up to `step`, from lines of metrics.jsonl and starts of environment.json."""
    images = hours = device_hours = 0
    for line in lines:
        if "images_per_s" not in line or line["step"] > step:
            continue
        elapsed = (line["samples"] - images) / line["images_per_s"] / 3600
        world_sizes = [start["world_size"] for start in starts if start["step"] < line["step"]]
        images, hours = line["samples"], hours + elapsed
        device_hours += elapsed * (world_sizes[-1] if world_sizes else 1)
    return Compute(images, hours, device_hours)


def _table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _data_table(sets: list[dict] | None) -> str:
    if not sets:
        return f"Data sets: {NOT_RECORDED}."
    lines = ["| set | source | split | images | license |", "| --- | --- | --- | --- | --- |"]
    for entry in sets:
        name, license_text = Path(entry["path"]).name, SOURCE_LICENSES.get(entry["source"], NOT_RECORDED)
        lines.append(f"| {name} | {entry['source']} | {entry['split']} | {entry['samples']:,} | {license_text} |")
    return "\n".join(lines)


def _describe_encoder(run: LoadedRun) -> Description:
    recipe = run.recipe
    name, paper = PAPERS[recipe.method.name]
    return Description(
        title=f"{recipe.model.name}, patch {recipe.model.patch_size}, {recipe.data.image_size} px, {name}",
        summary=f"A vision transformer, pre-trained without labels with {name} ({paper}).",
        tags=("masked-image-modeling", recipe.method.name),
        options={"targets": TARGETS[recipe.method.target.name]},
    )


def _describe_classifier(run: LoadedClassifier) -> Description:
    vit, options = run.vit, run.recipe.classifier
    names = enumerate(zip(vit.classes, vit.descriptions or [""] * len(vit.classes), strict=True))
    listed = "\n".join(f"{number:4} {name} {text}".rstrip() for number, (name, text) in names)
    return Description(
        title=f"Classifier of {len(vit.classes)} classes, patch {vit.patch_size}, {vit.data.image_size} px",
        summary="A vision transformer, fine-tuned to classify images by the mean of the patch tokens. Initial "
        f"weights: {run.initial.encoder} (digest {run.initial.digest}).\n\n<details><summary>Classes, in the "
        f"order of the logits</summary>\n\n```text\n{listed}\n```\n\n</details>",
        tags=("image-classification",),
        options={name: getattr(options, name) for name in ("layer_decay", "drop_path", "label_smoothing")},
    )


def _accuracy_table(run: RunDirectory, ema: bool) -> str:
    """Return the last evaluation of the run. Raises UserError if it cannot be read."""
    path = run.existing_results
    if not path.is_file():
        return f"Accuracy: {NOT_RECORDED}."
    result = read_json(path)
    try:
        names = ["top1", "top5"] if "top5" in result else ["top1"]  # no top5 with few classes
        tops = {name: Accuracy(result[name]["correct"], result[name]["total"]) for name in names}
        table = _table({f"{name}, 95 % interval": accuracy for name, accuracy in tops.items()})
        where = f"after step {result['step']:,} on {Path(result['val']['place']).name}"
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: damaged ({error!r}); restore it, or remove it to export without an accuracy"
        ) from error
    average = "; of the weights, not of their moving average, which is exported" if ema else ""
    return f"{table}\n\nMeasured {where}{average}. The interval covers sampling, not variance between runs."


def _training_table(loaded: Exportable, ema: bool, more: dict[str, object]) -> str:
    recipe, size, optim = loaded.recipe, loaded.vit.size, loaded.recipe.optim
    return _table(
        {
            "encoder": f"{size.depth} layers, width {size.width}, {size.heads} heads",
            "weights": f"moving average, decay {recipe.train.ema_decay}" if ema else "last step",
            "steps": f"{loaded.step:,}, batch size {recipe.data.global_batch:,}",
            "optimizer": f"AdamW, betas {list(optim.betas)}, weight decay {optim.weight_decay}",
            "learning rate": f"peak {recipe.peak_lr:.3g}, cosine decay",
            "precision": recipe.engine.precision,
            **more,
            "random seed": recipe.seed,
        }
    )


def _compute_table(run: RunDirectory, environment: dict, step: int) -> str:
    lines = read_metrics_log(run) if run.metrics.is_file() else []
    starts = environment.get("starts", [])
    compute = training_compute(lines, starts, step)
    if not compute.images:
        return f"Compute: {NOT_RECORDED}."
    versions = ", ".join(f"{name} {number}" for name, number in environment.get("versions", {}).items())
    devices = dict.fromkeys(f"{start['world_size']} x {start['device']}" for start in starts)
    return _table(
        {
            "devices": "; then ".join(devices) or NOT_RECORDED,
            "device hours": f"{compute.device_hours:.3g} ({compute.hours:.3g} h of training steps, without "
            "start-up, checkpoints and repeated steps)",
            "images": f"{compute.images:,}",
            "images/s": f"{compute.images / compute.hours / 3600:,.0f}",
            "versions": versions or NOT_RECORDED,
            "commit": environment.get("commit") or NOT_RECORDED,
        }
    )
