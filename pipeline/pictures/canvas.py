"""Layout of pictures: columns of tiles under titles, color scales, a chart, a caption; and tiling of images.

Invariant: no text is clipped, for any number of tiles.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

# Pixels.
GAP, MARGIN = 6, 12
MIN_TILE = 160
"""Smaller tiles are enlarged by an integer factor."""
MIN_FONT, FONT_PER_WIDTH = 14, 1 / 90
"""The font grows with the picture, because wider pictures are shown smaller."""
NO_VALUE = 200
"""Gray level of patches without a value."""
INK, GRID, ACCENT = "#1a1a1a", "#d9d9d9", "#b5367a"


class TextStyle(NamedTuple):
    font: ImageFont.FreeTypeFont
    small: ImageFont.FreeTypeFont
    size: int

    @property
    def line_height(self) -> int:
        return round(1.4 * self.size)


class Column(NamedTuple):
    title: str
    tiles: Sequence[np.ndarray] | np.ndarray
    """One uint8 image (H, W, 3) per row."""


class Scale(NamedTuple):
    """Legend of the colors of a map."""

    title: str
    low: str
    high: str


class Chart(NamedTuple):
    """Points with error bars, connected by a line."""

    title: str
    x_title: str
    x: Sequence[float]
    y: Sequence[float]
    bars: Sequence[float]


def heatmap(values: np.ndarray, low: float, high: float, side: int) -> np.ndarray:
    """Color maps (B, G, G) from black over red to yellow: uint8 (B, side, side, 3). NaN is gray."""
    from matplotlib import colormaps  # slow to import, and training draws without it

    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    colors = (colormaps["inferno"](share)[..., :3] * 255).round().astype(np.uint8)
    colors[np.isnan(values)] = NO_VALUE
    return upscale(colors, side)


def upscale(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 images (B, G, G, 3) to (B, side, side, 3) by nearest neighbor."""
    return np.stack([np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.NEAREST)) for p in pixels])


def render_grid(
    columns: Sequence[Column], caption: str, scales: Sequence[Scale] = (), chart: Chart | None = None
) -> Image.Image:
    """Draw columns of equally many square tiles of one size, and below them scales, chart and caption."""
    rows, tile = len(columns[0].tiles), _tile_side(columns[0].tiles[0].shape[0])
    width = len(columns) * (tile + GAP) - GAP
    style = text_style(width, tile)
    titles = [wrap_text(column.title, tile, style) for column in columns]
    caption_lines = wrap_text(caption, width, style)
    scale_width, scale_height = 15 * style.size, 4 * style.line_height
    scales_per_row = max(1, (width + MARGIN) // (scale_width + MARGIN))

    tiles_top = MARGIN + style.line_height * max(map(len, titles))
    scales_top = tiles_top + rows * (tile + GAP) + MARGIN - GAP
    chart_top = scales_top + math.ceil(len(scales) / scales_per_row) * scale_height
    caption_top = chart_top + (18 * style.size if chart else 0)
    height = caption_top + style.line_height * len(caption_lines) + MARGIN
    picture = Image.new("RGB", (width + 2 * MARGIN, height), "white")
    draw = ImageDraw.Draw(picture)
    for number, (column, title) in enumerate(zip(columns, titles, strict=True)):
        x = MARGIN + number * (tile + GAP)
        _draw_lines(draw, (x + tile / 2, tiles_top - style.line_height * len(title)), title, "ma", style)
        for row, pixels in enumerate(column.tiles):
            picture.paste(Image.fromarray(upscale(pixels[None], tile)[0]), (x, tiles_top + row * (tile + GAP)))
    for number, scale in enumerate(scales):
        row, position = divmod(number, scales_per_row)
        corner = MARGIN + position * (scale_width + MARGIN), scales_top + row * scale_height
        _draw_scale(picture, corner, scale_width, scale, style)
    if chart:
        _draw_lines(draw, (MARGIN, chart_top), wrap_text(chart.title, width, style), "la", style)
        axes_top = chart_top + style.line_height
        plot = _render_chart(chart, width, caption_top - MARGIN - axes_top, 0.86 * style.size)
        picture.paste(plot, (MARGIN, axes_top))
    _draw_lines(draw, (MARGIN, caption_top), caption_lines, "la", style)
    return picture


def split_columns(picture: Image.Image, size: int) -> list[Image.Image]:
    """Crop the columns of tiles, without titles, out of a picture of `render_grid`.

    Args:
        picture: Drawn without scales and chart, with titles of one line.
        size: Side of the tiles before they were enlarged.
    """
    tile = _tile_side(size)
    width = picture.width - 2 * MARGIN
    top = MARGIN + text_style(width, tile).line_height
    rows = (picture.height - top) // (tile + GAP)
    edges = range(MARGIN, MARGIN + width, tile + GAP)
    return [picture.crop((x, top, x + tile, top + rows * (tile + GAP) - GAP)) for x in edges]


def wrap_text(text: str, width: float, style: TextStyle) -> list[str]:
    """Split text into lines of at most `width` pixels; a wider word gets its own line."""
    lines: list[str] = []
    for word in text.split():
        if lines and style.font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _tile_side(size: int) -> int:
    return size * max(1, math.ceil(MIN_TILE / size))


def text_style(width: int, tile: int) -> TextStyle:
    size = max(MIN_FONT, min(round(width * FONT_PER_WIDTH), tile // 8))  # the words of a title have to fit
    font, small = (ImageFont.load_default(pixels) for pixels in (size, round(0.86 * size)))
    assert isinstance(font, ImageFont.FreeTypeFont) and isinstance(small, ImageFont.FreeTypeFont)
    return TextStyle(font, small, size)


def _draw_lines(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], lines: list[str], anchor: str, style: TextStyle
) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * style.line_height), line, INK, style.font, anchor=anchor)


def _draw_scale(picture: Image.Image, corner: tuple[int, int], width: int, scale: Scale, style: TextStyle) -> None:
    x, y = corner
    draw = ImageDraw.Draw(picture)
    draw.text((x, y), scale.title, INK, style.small)
    ramp = heatmap(np.linspace(0, 1, width)[None, None], 0, 1, width)[0][: style.size]
    picture.paste(Image.fromarray(ramp), (x, y + style.line_height))
    below = y + style.line_height + style.size + 3
    draw.text((x, below), scale.low, INK, style.small)
    draw.text((x + width, below), scale.high, INK, style.small, anchor="ra")


def _render_chart(chart: Chart, width: int, height: int, font_size: float) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width / 72, height / 72), dpi=72, layout="constrained")  # one point is one pixel
    axes = figure.add_subplot()
    axes.errorbar(chart.x, chart.y, chart.bars, color=ACCENT, marker="o", markersize=font_size / 2, linewidth=2)
    axes.set_xlabel(chart.x_title, color=INK, size=font_size)
    axes.tick_params(length=0, pad=GAP, labelcolor=INK, labelsize=font_size)
    axes.set_xlim(0, 1.05 * max(chart.x))
    axes.set_ylim(0, 1.1 * max(np.add(chart.y, chart.bars)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def split_tiles(images: torch.Tensor, per_side: int) -> torch.Tensor:
    """Cut images (B, C, N S, N S) into tiles (B N N, C, S, S), row by row."""
    batch, channels, side, _ = images.shape
    size = side // per_side
    tiles = images.reshape(batch, channels, per_side, size, per_side, size)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, size, size)


def join_tiles(tiles: torch.Tensor, per_side: int) -> torch.Tensor:
    """Invert `split_tiles`."""
    count, channels, size, _ = tiles.shape
    images = tiles.reshape(count // per_side**2, per_side, per_side, channels, size, size)
    return images.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, per_side * size, per_side * size)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Invert `losses.patchify` for square images: (B, L, P*P*3) to (B, 3, S, S)."""
    batch, length, _ = patches.shape
    grid = math.isqrt(length)
    tiles = patches.reshape(batch, grid, grid, patch_size, patch_size, 3)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, grid * patch_size, grid * patch_size)


def to_maps(values: torch.Tensor, per_side: int) -> torch.Tensor:
    """Arrange one number per patch, (B N N, L), as maps of whole images (B, N G, N G)."""
    grid = math.isqrt(values.shape[1])
    return join_tiles(values.reshape(-1, 1, grid, grid), per_side)[:, 0]
