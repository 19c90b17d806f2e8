"""Write a shard set's card: card.md, card.json and contact_sheet.png.

Invariant: they are a pure function of the set's content and contain no time, path or machine.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import shard_set
from data_prep.atomic import atomic_write
from data_prep.shard_set import Manifest
from data_prep.stats import ASPECT_EDGES, KILOBYTE_EDGES, SHORTER_SIDE_EDGES, Stats

_COLUMNS, _ROWS, _THUMBNAIL, _GAP = 10, 5, 112, 4  # the last two in pixels
_BAR = 40  # characters
_MAX_CLASSES = 100


def write_card(directory: Path, manifest: Manifest, stats: Stats) -> None:
    atomic_write(directory / shard_set.CONTACT_SHEET, _render_contact_sheet(directory, manifest))
    atomic_write(directory / shard_set.CARD, _render_card(manifest, stats).encode())
    figures = json.dumps(_figures(manifest, stats), indent=1) + "\n"
    atomic_write(directory / shard_set.CARD_JSON, figures.encode())


def _figures(manifest: Manifest, stats: Stats) -> dict[str, Any]:
    """Return the card's figures; a histogram's bin reaches from its name up to the next one."""
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


def _render_card(manifest: Manifest, stats: Stats) -> str:
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
        f"![contact sheet]({shard_set.CONTACT_SHEET})",
        "",
        *_count_table("Repaired", stats.repairs),
        *_count_table(f"Quarantined (see {shard_set.QUARANTINE})", stats.quarantine),
        *_count_table("Metadata left out because they are damaged", stats.unreadable),
        *_histogram("Shorter side, px", stats.shorter_side, SHORTER_SIDE_EDGES),
        *_histogram("Width / height", stats.aspect, ASPECT_EDGES),
        *_histogram("File size, kB", stats.kilobytes, KILOBYTE_EDGES),
        *_class_table(manifest, stats),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _count_table(title: str, counts: Counter) -> list[str]:
    if not counts:
        return []
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [f"| {name} | {count:,} |" for name, count in ordered]
    return [f"## {title}", "", "| what | number |", "| --- | --- |", *rows, ""]


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


def _class_table(manifest: Manifest, stats: Stats) -> list[str]:
    if not manifest.classes:
        return []
    if not manifest.has_labels and not stats.labels:
        names = ", ".join(map(_escape_cell, manifest.classes[:_MAX_CLASSES]))
        return [f"## Classes of {manifest.annotation.replace('_', ' ')}", "", names, ""]
    lines = ["## Classes", "", "| label | class | name | samples |", "| --- | --- | --- | --- |"]
    for label, name in enumerate(manifest.classes[:_MAX_CLASSES]):
        readable = manifest.class_names[label] if manifest.class_names else ""
        lines.append(f"| {label} | {_escape_cell(name)} | {_escape_cell(readable)} | {stats.labels[str(label)]:,} |")
    if len(manifest.classes) > _MAX_CLASSES:
        lines += ["", f"and {len(manifest.classes) - _MAX_CLASSES:,} more in manifest.json"]
    counts = [stats.labels[str(label)] for label in range(len(manifest.classes))]
    return [*lines, "", f"Samples in a class: {min(counts):,} to {max(counts):,}.", ""]


def _escape_cell(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("|", "\\|").replace("\n", " ")


def _render_contact_sheet(directory: Path, manifest: Manifest) -> bytes:
    """Return a PNG with evenly spaced samples of the set, center-cropped to squares."""
    from PIL import Image

    from data_prep import jpeg, pixels

    chosen = np.unique(np.linspace(0, manifest.num_samples - 1, _COLUMNS * _ROWS).astype(np.int64))
    columns = min(_COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    step = _THUMBNAIL + _GAP
    sheet = Image.new("RGB", (columns * step + _GAP, rows * step + _GAP), "white")
    for place, data in enumerate(_read_samples(directory, manifest, chosen)):
        try:
            info = jpeg.parse_jpeg(data)
            array = pixels.decode_jpeg(data, info.width, info.height, info.components == 1, _THUMBNAIL // 2)
        except pixels.ImageError:  # with --check structure nothing has decoded it before
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


def _read_samples(directory: Path, manifest: Manifest, chosen: np.ndarray) -> Iterator[bytes]:
    """Yield the images at the positions `chosen` of the set, ascending."""
    first = 0
    for shard in manifest.shards:
        inside = chosen[(chosen >= first) & (chosen < first + shard.samples)] - first
        first += shard.samples
        if not len(inside):
            continue
        index = shard_set.read_index(directory, shard)
        with open(shard_set.tar_path(directory, shard), "rb") as file:
            for i in map(int, inside):
                file.seek(index.offsets[i])
                yield file.read(index.sizes[i])
