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
from pipeline.evals.accuracy import RESULT, Accuracy
from pipeline.export.target import Exportable, Target
from pipeline.io.atomic import read_json
from pipeline.report.history import METRICS, logged
from pipeline.tasks.finetuned_run import FinetunedRun
from pipeline.weights.run import LoadedRun
from pipeline.weights.vit import Vit

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

Images are RGB, from 0 to 1, less the mean $mean, over the standard deviation $std: the central
$size x $size px where the shorter side has been resized (bicubic) to $resize px.

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

Loaded again by the library it is for, its outputs differ from the trained model's by at most $difference
of the largest, in fp32.

## Licence

Licence of these weights: **to be filled in** by whoever publishes them; the data's terms may bind it.
""")

CLASSES = Template("""\
<details><summary>The classes, in the order of the logits</summary>

```text
$listed
```

</details>""")


class Spent(NamedTuple):
    """What the steps up to the exported one took."""

    images: int
    hours: float
    """Of training steps; without starts, checkpoints, and steps trained again after an interruption."""
    device_hours: float
    """The same, times the number of ranks."""


class Kind(NamedTuple):
    """What only a card of an encoder says, or only that of a classifier."""

    tags: tuple[str, ...]
    title: str
    summary: str
    training: dict[str, object]
    """Rows of the table."""
    results: tuple[str, ...]


def recorded(
    run: Path, trained: Exportable, target: Target, ema: bool, results: Sequence[Path] = ()
) -> dict[str, str]:
    """What README.md says before the export is checked. ema: the weights are their moving average. results:
    files of JSON to quote. UserError where one, or what the run wrote, cannot be read."""
    vit, data = trained.vit, trained.recipe.data
    environment = read_json(run / "environment.json") if (run / "environment.json").is_file() else {}
    kind = _classifier(run, trained, ema) if isinstance(trained, FinetunedRun) else _encoder(trained)
    return dict(
        tags=", ".join([*target.tags, "vit", *kind.tags]),
        title=kind.title,
        summary=kind.summary,
        usage=target.usage(trained).strip(),
        mean=str(list(data.mean)),
        std=str(list(data.std)),
        size=str(data.image_size),
        resize=str(vit.resize),
        data=_data(environment.get("data")),
        training=_training(trained, ema, kind.training),
        recipe=yaml.safe_dump(trained.recipe.model_dump(mode="json"), sort_keys=False).strip(),
        compute=_compute(run, environment, trained.step),
        results="\n\n".join([*kind.results, *_quoted(results)]) or f"Results: {NOT_RECORDED}.",
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


def _encoder(trained: LoadedRun) -> Kind:
    recipe = trained.recipe
    name, paper = PAPERS[recipe.method.name]
    return Kind(
        tags=("masked-image-modeling", recipe.method.name),
        title=f"{recipe.model.name}, patch {recipe.model.patch_size}, {recipe.data.image_size} px, {name}",
        summary=f"A vision transformer, pre-trained without labels by {name} ({paper}).",
        training={"targets": "pixels, normalised per patch" if recipe.method.normalize_targets else "pixels"},
        results=(),
    )


def _classifier(run: Path, trained: FinetunedRun, ema: bool) -> Kind:
    vit, begun = trained.vit, trained.begun
    count, section = len(vit.classes), trained.recipe.classifier
    return Kind(
        tags=("image-classification",),
        title=f"Classifier of {count} classes, patch {vit.patch_size}, {vit.data.image_size} px",
        summary=f"A vision transformer with a head that tells {count} classes apart by the mean of the patch "
        f"tokens, fine-tuned on labels. It began with {begun.encoder} (digest of those weights: "
        f"{begun.digest}).\n\n{_classes(vit)}",
        training={
            "layer decay": section.layer_decay,
            "drop path": section.drop_path,
            "label smoothing": section.label_smoothing,
        },
        results=(_accuracy(run, ema),),
    )


def _classes(vit: Vit) -> str:
    described = vit.descriptions or [""] * len(vit.classes)
    pairs = enumerate(zip(vit.classes, described, strict=True))
    listed = "\n".join(f"{number:4} {name} {more}".rstrip() for number, (name, more) in pairs)
    return CLASSES.substitute(listed=listed)


def _accuracy(run: Path, ema: bool) -> str:
    """What the run measured last. UserError where that cannot be read."""
    if not (run / RESULT).is_file():
        return f"Accuracy: {NOT_RECORDED}."
    found = read_json(run / RESULT)
    try:
        names = ["top1", "top5"] if "top5" in found else ["top1"]  # few classes have no top5
        tops = {name: Accuracy(found[name]["correct"], found[name]["total"]) for name in names}
        table = _table({f"{name}, 95 % interval": accuracy for name, accuracy in tops.items()})
        where = f"after step {found['step']:,} on {Path(found['val']['place']).name}"
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{run / RESULT}: is not what a fine-tuning measures ({error!r}); mend or remove it"
        ) from None
    average = "; of the weights, not of their moving average, which these are" if ema else ""
    return f"{table}\n\nMeasured {where}{average}. The interval is of the samples drawn, not of the training."


def _training(trained: Exportable, ema: bool, more: dict[str, object]) -> str:
    recipe, size, optim = trained.recipe, trained.vit.size, trained.recipe.optim
    return _table(
        {
            "encoder": f"{size.depth} layers, {size.width} wide, {size.heads} heads",
            "weights": f"moving average, decay {recipe.train.ema_decay}" if ema else "of the last step",
            "steps": f"{trained.step:,}, a batch of {recipe.data.global_batch:,} images each",
            "optimiser": f"AdamW, betas {list(optim.betas)}, weight decay {optim.weight_decay}",
            "learning rate": f"{recipe.lr:.3g} at its peak, then a cosine",
            "precision": recipe.engine.precision,
            **more,
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


def _quoted(results: Sequence[Path]) -> list[str]:
    texts = {path: json.dumps(read_json(path), indent=1) for path in results}
    return [f"{path.name}:\n\n```json\n{text}\n```" for path, text in texts.items()]
