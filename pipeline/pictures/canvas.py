"""How pictures are laid out: columns of tiles under titles, scales of colours, a chart, a caption.

Invariant: no text is cut off, whatever the number of tiles; all pictures have the same type and gaps.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

GAP, MARGIN = 6, 12
"""Pixels between tiles, and around everything."""
TILE = 160
"""Pixels that a tile is enlarged to at least, by a whole factor."""
NOTHING = 200
"""Level of grey where a map has no value."""
INK, FAINT, ACCENT = "#1a1a1a", "#d9d9d9", "#b5367a"
SMALLEST, OF_THE_WIDTH = 14, 1 / 90
"""Of the type, in pixels: it grows with the picture, which is shown smaller the wider it is."""


class Type(NamedTuple):
    font: ImageFont.FreeTypeFont
    small: ImageFont.FreeTypeFont
    size: int

    @property
    def line(self) -> int:
        """From line to line."""
        return round(1.4 * self.size)


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


def render_grid(
    columns: Sequence[Column], caption: str, scales: Sequence[Scale] = (), chart: Chart | None = None
) -> Image.Image:
    """The picture. All columns have as many tiles, all tiles one size."""
    size, rows = columns[0].tiles[0].shape[0], len(columns[0].tiles)
    tile = size * max(1, -(-TILE // size))
    inside = len(columns) * (tile + GAP) - GAP
    type_ = _type(inside, tile)
    lines = wrapped(caption, inside, type_)
    titles = [wrapped(column.title, tile, type_) for column in columns]
    top = MARGIN + type_.line * max(map(len, titles))
    below = top + rows * (tile + GAP) + MARGIN - GAP
    scale_width = 15 * type_.size
    per_line = max(1, (inside + MARGIN) // (scale_width + MARGIN))
    scale_height = 4 * type_.line
    top_of_chart = below + math.ceil(len(scales) / per_line) * scale_height
    top_of_caption = top_of_chart + (18 * type_.size if chart else 0)

    height = top_of_caption + type_.line * len(lines) + MARGIN
    canvas = Image.new("RGB", (inside + 2 * MARGIN, height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, column in enumerate(columns):
        x = MARGIN + number * (tile + GAP)
        _text(draw, (x + tile / 2, top - type_.line * len(titles[number])), titles[number], "ma", type_)
        for row, pixels in enumerate(column.tiles):
            canvas.paste(Image.fromarray(enlarged(pixels[None], tile)[0]), (x, top + row * (tile + GAP)))
    for number, scale in enumerate(scales):
        line, place = divmod(number, per_line)
        x = MARGIN + place * (scale_width + MARGIN)
        _draw_scale(canvas, (x, below + line * scale_height), scale_width, scale, type_)
    if chart:
        box = (MARGIN, top_of_chart, MARGIN + inside, top_of_caption - MARGIN)
        _draw_chart(draw, box, chart, type_)
    _text(draw, (MARGIN, top_of_caption), lines, "la", type_)
    return canvas


def columns_of(picture: Image.Image, size: int) -> list[Image.Image]:
    """The columns of a sheet of tiles of `size` pixels, without their titles; for one without scales and
    chart, whose titles take a line."""
    tile = size * max(1, -(-TILE // size))
    inside = picture.width - 2 * MARGIN
    top = MARGIN + _type(inside, tile).line
    rows = (picture.height - top) // (tile + GAP)
    edges = range(MARGIN, MARGIN + inside, tile + GAP)
    return [picture.crop((x, top, x + tile, top + rows * (tile + GAP) - GAP)) for x in edges]


def wrapped(text: str, width: float, type_: Type) -> list[str]:
    """Lines no wider than `width` pixels; a single word that is wider stands alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and type_.font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _type(width: int, tile: int) -> Type:
    size = max(SMALLEST, min(round(width * OF_THE_WIDTH), tile // 8))  # so that a title's words fit
    return Type(ImageFont.load_default(size), ImageFont.load_default(round(0.86 * size)), size)


def _text(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], lines: list[str], anchor: str, type_: Type
) -> None:
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * type_.line), line, INK, type_.font, anchor=anchor)


def _draw_scale(canvas: Image.Image, place: tuple[int, int], width: int, scale: Scale, type_: Type) -> None:
    x, y = place
    draw = ImageDraw.Draw(canvas)
    draw.text((x, y), scale.title, INK, type_.small)
    ramp = heat(np.linspace(0, 1, width)[None, None], 0, 1, width)[0][: type_.size]
    canvas.paste(Image.fromarray(ramp), (x, y + type_.line))
    under = y + type_.line + type_.size + 3
    draw.text((x, under), scale.low, INK, type_.small)
    draw.text((x + width, under), scale.high, INK, type_.small, anchor="ra")


def _draw_chart(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], chart: Chart, type_: Type) -> None:
    left, top, right = box[0] + 3 * type_.size, box[1] + type_.line + GAP, box[2] - type_.size
    bottom = box[3] - 2 * type_.line - GAP
    draw.text(box[:2], chart.title, INK, type_.font)
    most_x, step_x = _ticks(max(chart.x))
    most_y, step_y = _ticks(max(y + bar for y, bar in zip(chart.y, chart.bars, strict=True)))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / most_x * (right - left), bottom - y / most_y * (bottom - top)

    for number in range(round(most_y / step_y) + 1):
        y = number * step_y
        draw.line([at(0, y), at(most_x, y)], FAINT)
        draw.text((left - GAP, at(0, y)[1]), f"{y:g}", INK, type_.small, anchor="rm")
    for number in range(round(most_x / step_x) + 1):
        x = number * step_x
        draw.text((at(x, 0)[0], bottom + GAP), f"{x:g}", INK, type_.small, anchor="ma")
    draw.text(((left + right) / 2, bottom + type_.line), chart.x_title, INK, type_.small, anchor="ma")
    thick, radius = max(2, type_.size // 7), type_.size / 4
    draw.line([at(x, y) for x, y in zip(chart.x, chart.y, strict=True)], ACCENT, thick, joint="curve")
    for x, y, bar in zip(chart.x, chart.y, chart.bars, strict=True):
        draw.line([at(x, max(0, y - bar)), at(x, y + bar)], ACCENT, max(1, thick // 2))
        across, down = at(x, y)
        draw.ellipse([across - radius, down - radius, across + radius, down + radius], ACCENT)


def _ticks(most: float) -> tuple[float, float]:
    """The end of an axis from 0, and the step of its ticks: 1, 2 or 5 times a power of ten, 4 to 10 of
    them."""
    power = 10 ** math.floor(math.log10(most))
    step = next(power * factor for factor in (0.1, 0.2, 0.5, 1, 2) if most / (power * factor) <= 8)
    return math.ceil(most / step - 1e-9) * step, step


def cut(images: torch.Tensor, per_side: int) -> torch.Tensor:
    """(B, C, N S, N S) to (B N N, C, S, S), row by row."""
    batch, channels, side, _ = images.shape
    size = side // per_side
    squares = images.reshape(batch, channels, per_side, size, per_side, size)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, size, size)


def join(squares: torch.Tensor, per_side: int) -> torch.Tensor:
    """The inverse of `cut`."""
    count, channels, size, _ = squares.shape
    images = squares.reshape(count // per_side**2, per_side, per_side, channels, size, size)
    return images.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, per_side * size, per_side * size)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, L, P*P*3) in patchify's order back to square images (B, 3, S, S)."""
    batch, length, _ = patches.shape
    grid = math.isqrt(length)
    tiles = patches.reshape(batch, grid, grid, patch_size, patch_size, 3)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, grid * patch_size, grid * patch_size)


def as_maps(values: torch.Tensor, per_side: int) -> torch.Tensor:
    """A number a patch, (B N N, L), to maps of whole photographs (B, N G, N G)."""
    grid = math.isqrt(values.shape[1])
    return join(values.reshape(-1, 1, grid, grid), per_side)[:, 0]
