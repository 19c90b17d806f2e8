"""How pictures are laid out: columns of tiles under titles, scales of colours, a chart, a caption.

Invariant: no text is cut off, whatever the number of tiles; all pictures have the same type and gaps.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, MARGIN, LINE = 6, 12, 20
"""Pixels between tiles, around everything, and from line to line of text."""
TILE = 160
"""Pixels that a tile is enlarged to at least, by a whole factor."""
SCALE_WIDTH, SCALE_HEIGHT = 220, 12
CHART_HEIGHT = 260
INK, FAINT, ACCENT = "#1a1a1a", "#d9d9d9", "#b5367a"
NOTHING = 200
"""Level of grey where a map has no value."""
FONT, SMALL = ImageFont.load_default(14), ImageFont.load_default(12)


class Column(NamedTuple):
    title: str
    tiles: Sequence[np.ndarray]
    """A row each: uint8 (H, W, 3)."""


class Scale(NamedTuple):
    """What the colours of a map mean."""

    title: str
    low: str
    high: str


class Chart(NamedTuple):
    """Points with their error bars, joined by a line."""

    title: str
    x_title: str
    x: Sequence[float]
    y: Sequence[float]
    bars: Sequence[float]


def heat(values: np.ndarray, low: float, high: float, side: int) -> np.ndarray:
    """(B, G, G) to colours from black over red to light yellow: uint8 (B, side, side, 3), without
    smoothing. NaN is grey."""
    from matplotlib import colormaps  # slow to import, and training draws without it

    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    colours = (colormaps["inferno"](share)[..., :3] * 255).round().astype(np.uint8)
    colours[np.isnan(values)] = NOTHING
    return enlarged(colours, side)


def enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 (B, G, G, 3) to (B, side, side, 3), pixel by pixel."""
    return np.stack(
        [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.NEAREST)) for p in pixels]
    )


def sheet(
    columns: Sequence[Column], caption: str, scales: Sequence[Scale] = (), chart: Chart | None = None
) -> Image.Image:
    """The picture. All columns have as many tiles, all tiles one size."""
    size, rows = columns[0].tiles[0].shape[0], len(columns[0].tiles)
    tile = size * max(1, -(-TILE // size))
    width = len(columns) * (tile + GAP) - GAP + 2 * MARGIN
    lines = wrapped(caption, width - 2 * MARGIN)
    titles = [wrapped(column.title, tile) for column in columns]
    top = MARGIN + LINE * max(map(len, titles))
    below = top + rows * (tile + GAP) + MARGIN - GAP
    per_line = max(1, (width - 2 * MARGIN + MARGIN) // (SCALE_WIDTH + MARGIN))
    scale_block = math.ceil(len(scales) / per_line) * (2 * LINE + SCALE_HEIGHT + GAP)
    chart_block = CHART_HEIGHT + MARGIN if chart else 0
    height = below + scale_block + chart_block + LINE * len(lines) + MARGIN

    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, column in enumerate(columns):
        x = MARGIN + number * (tile + GAP)
        _text(draw, (x + tile / 2, top - LINE * len(titles[number])), titles[number], "ma")
        for row, pixels in enumerate(column.tiles):
            canvas.paste(Image.fromarray(enlarged(pixels[None], tile)[0]), (x, top + row * (tile + GAP)))
    for number, scale in enumerate(scales):
        line, place = divmod(number, per_line)
        x = MARGIN + place * (SCALE_WIDTH + MARGIN)
        _draw_scale(canvas, (x, below + line * (2 * LINE + SCALE_HEIGHT + GAP)), scale)
    if chart:
        _draw_chart(
            draw, (MARGIN, below + scale_block, width - MARGIN, below + scale_block + CHART_HEIGHT), chart
        )
    _text(draw, (MARGIN, height - MARGIN - LINE * len(lines)), lines, "la")
    return canvas


def wrapped(text: str, width: float) -> list[str]:
    """Lines no wider than `width` pixels; a single word that is wider stands alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and FONT.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _text(draw: ImageDraw.ImageDraw, place: tuple[float, float], lines: list[str], anchor: str) -> None:
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * LINE), line, INK, FONT, anchor=anchor)


def _draw_scale(canvas: Image.Image, place: tuple[int, int], scale: Scale) -> None:
    x, y = place
    draw = ImageDraw.Draw(canvas)
    draw.text((x, y), scale.title, INK, SMALL)
    ramp = heat(np.linspace(0, 1, SCALE_WIDTH)[None, None], 0, 1, SCALE_WIDTH)[0][:SCALE_HEIGHT]
    canvas.paste(Image.fromarray(ramp), (x, y + LINE))
    under = y + LINE + SCALE_HEIGHT + 2
    draw.text((x, under), scale.low, INK, SMALL)
    draw.text((x + SCALE_WIDTH, under), scale.high, INK, SMALL, anchor="ra")


def _draw_chart(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], chart: Chart) -> None:
    left, top, right, bottom = box[0] + 44, box[1] + LINE + GAP, box[2] - GAP, box[3] - 2 * LINE
    draw.text(box[:2], chart.title, INK, FONT)
    most_x, step_x = _ticks(max(chart.x))
    most_y, step_y = _ticks(max(y + bar for y, bar in zip(chart.y, chart.bars, strict=True)))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / most_x * (right - left), bottom - y / most_y * (bottom - top)

    for number in range(round(most_y / step_y) + 1):
        y = number * step_y
        draw.line([at(0, y), at(most_x, y)], FAINT)
        draw.text((left - GAP, at(0, y)[1]), f"{y:g}", INK, SMALL, anchor="rm")
    for number in range(round(most_x / step_x) + 1):
        x = number * step_x
        draw.text((at(x, 0)[0], bottom + GAP), f"{x:g}", INK, SMALL, anchor="ma")
    draw.text(((left + right) / 2, bottom + LINE + GAP), chart.x_title, INK, SMALL, anchor="ma")
    points = [at(x, y) for x, y in zip(chart.x, chart.y, strict=True)]
    draw.line(points, ACCENT, 2)
    for x, y, bar in zip(chart.x, chart.y, chart.bars, strict=True):
        draw.line([at(x, y - bar), at(x, y + bar)], ACCENT)
        centre = at(x, y)
        draw.ellipse([centre[0] - 3, centre[1] - 3, centre[0] + 3, centre[1] + 3], ACCENT)


def _ticks(most: float) -> tuple[float, float]:
    """The end of an axis from 0, and the step of its ticks: 1, 2 or 5 times a power of ten, 4 to 10 of
    them."""
    power = 10 ** math.floor(math.log10(most))
    step = next(power * factor for factor in (0.1, 0.2, 0.5, 1, 2) if most / (power * factor) <= 8)
    return math.ceil(most / step - 1e-9) * step, step
