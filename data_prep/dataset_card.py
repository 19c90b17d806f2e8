"""card.md and contact_sheet.png: a shard set at a glance, for people.

Invariant: both are a pure function of the set's content; they hold no time, path or machine.
"""

import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shard_set import (
    CARD,
    CARD_JSON,
    CONTACT_SHEET,
    QUARANTINE,
    Manifest,
    read_index,
    tar_path,
    write_atomically,
)
from data_prep.stats import ASPECT_EDGES, KILOBYTE_EDGES, SHORTER_SIDE_EDGES, Stats

_COLUMNS, _ROWS, _THUMBNAIL, _GAP = 10, 5, 112, 4  # the last two in pixels
_BAR = 40  # characters
_CLASSES_LISTED = 100


def write_card(directory: Path, manifest: Manifest, stats: Stats) -> None:
    write_atomically(directory / CONTACT_SHEET, contact_sheet(directory, manifest))
    write_atomically(directory / CARD, card(manifest, stats).encode())
    write_atomically(directory / CARD_JSON, (json.dumps(summary(manifest, stats), indent=1) + "\n").encode())


def summary(manifest: Manifest, stats: Stats) -> dict[str, Any]:
    """The card's figures. Histograms count from the named value up to the next one."""
    return {
        "source": manifest.source,
        "split": manifest.split,
        "seed": manifest.seed,
        "options": dict(manifest.options),
        "inputs": manifest.inputs,
        "samples": manifest.num_samples,
        "quarantined": manifest.quarantined,
        "shards": len(manifest.shards),
        "bytes": manifest.num_bytes,
        "classes": len(manifest.classes),
        **stats.to_json(),
    }


def card(manifest: Manifest, stats: Stats) -> str:
    lines = [
        f"# {manifest.source}, {manifest.split}",
        "",
        "| | |",
        "| --- | --- |",
        f"| samples | {manifest.num_samples:,} |",
        f"| shards | {len(manifest.shards):,}, {manifest.num_bytes / 1e9:,.3f} GB |",
        f"| inputs | {manifest.inputs:,} |",
        f"| quarantined | {manifest.quarantined:,} |",
        f"| classes | {len(manifest.classes):,} |",
        f"| grey, RGB | {stats.color['grey']:,}, {stats.color['RGB']:,} |",
        f"| seed | {manifest.seed} |",
        *(f"| {name} | {value} |" for name, value in sorted(manifest.options.items()) if value is not None),
        "",
        f"![contact sheet]({CONTACT_SHEET})",
        "",
        *_counts("Repaired", stats.repairs),
        *_counts(f"Quarantined (see {QUARANTINE})", stats.quarantine),
        *_histogram("Shorter side, px", stats.shorter_side, SHORTER_SIDE_EDGES),
        *_histogram("Width / height", stats.aspect, ASPECT_EDGES),
        *_histogram("File size, kB", stats.kilobytes, KILOBYTE_EDGES),
        *_classes(manifest, stats),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _counts(title: str, counts: Counter) -> list[str]:
    if not counts:
        return []
    rows = [
        f"| {name} | {count:,} |"
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    return [f"## {title}", "", "| what | images |", "| --- | --- |", *rows, ""]


def _histogram(title: str, counts: Counter, edges: tuple[float, ...]) -> list[str]:
    names = [str(edge) for edge in (0, *edges)]
    used = [i for i, name in enumerate(names) if counts[name]]
    lines = [f"## {title}", "", "```"]
    largest = max(counts.values())
    for i in range(used[0], used[-1] + 1):
        top = f"to {names[i + 1]}" if i + 1 < len(names) else "up"
        count = counts[names[i]]
        bar = "#" * math.ceil(_BAR * count / largest)
        lines.append(f"{names[i]:>6} {top:8} {count:>12,} {bar}".rstrip())
    return [*lines, "```", ""]


def _classes(manifest: Manifest, stats: Stats) -> list[str]:
    if not manifest.classes:
        return []
    lines = ["## Classes", "", "| label | class | name | samples |", "| --- | --- | --- | --- |"]
    for label, name in enumerate(manifest.classes[:_CLASSES_LISTED]):
        readable = manifest.class_names[label] if manifest.class_names else ""
        lines.append(f"| {label} | {_cell(name)} | {_cell(readable)} | {stats.labels[str(label)]:,} |")
    if len(manifest.classes) > _CLASSES_LISTED:
        lines += ["", f"and {len(manifest.classes) - _CLASSES_LISTED:,} more in manifest.json"]
    counts = [stats.labels[str(label)] for label in range(len(manifest.classes))]
    return [*lines, "", f"Samples in a class: {min(counts):,} to {max(counts):,}.", ""]


def _cell(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("|", "\\|").replace("\n", " ")


def contact_sheet(directory: Path, manifest: Manifest) -> bytes:
    """A PNG with evenly spaced samples of the set, centre-cropped to squares."""
    from PIL import Image

    from data_prep import jpeg, pixels

    wanted = np.unique(np.linspace(0, manifest.num_samples - 1, _COLUMNS * _ROWS).astype(np.int64))
    columns = min(_COLUMNS, len(wanted))
    rows = math.ceil(len(wanted) / columns)
    step = _THUMBNAIL + _GAP
    sheet = Image.new("RGB", (columns * step + _GAP, rows * step + _GAP), "white")
    for place, data in enumerate(_read_samples(directory, manifest, wanted)):
        try:
            header = jpeg.walk(data)
            array = pixels.decode_jpeg(
                data, header.width, header.height, header.components == 1, _THUMBNAIL // 2
            )
        except ValueError:  # under --check structure nobody has decoded it before
            continue
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        thumbnail = image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.HAMMING, box=box)
        sheet.paste(thumbnail, (_GAP + place % columns * step, _GAP + place // columns * step))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _read_samples(directory: Path, manifest: Manifest, wanted: np.ndarray):
    first = 0
    for shard in manifest.shards:
        inside = wanted[(wanted >= first) & (wanted < first + shard.samples)] - first
        first += shard.samples
        if not len(inside):
            continue
        index = read_index(directory, shard)
        with open(tar_path(directory, shard), "rb") as file:
            for i in inside:
                file.seek(index.offsets[i])
                yield file.read(index.sizes[i])
