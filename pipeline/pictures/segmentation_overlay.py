"""Pictures of semantic segmentation: the classes as colors over the image, and a legend."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pipeline.pictures.canvas import GAP, INK, MARGIN, text_style

OPACITY = 0.6
"""Of the colors over the image."""
MIN_WIDTH = 480
"""Of a picture, in pixels; smaller images are enlarged."""
LEGEND_COLUMN = 190
"""Smallest width of a legend's column, in pixels."""
MAX_ENTRIES = 24
"""Classes in a legend; the others are counted in its last entry."""


def class_colors(num_classes: int) -> np.ndarray:
    """Return a color for each of at most 255 classes, uint8 (C, 3): Pascal VOC's, without its black."""
    numbers = np.arange(1, num_classes + 1)
    colors = np.zeros((num_classes, 3), int)
    for level in range(3):  # each three bits of the number give the next lower bit of red, green and blue
        for channel in range(3):
            colors[:, channel] |= (numbers >> (3 * level + channel) & 1) << (7 - level)
    return colors.astype(np.uint8)


def render_segmentation(image: Image.Image, classes: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Draw an RGB image, and next to it the image under the colors of its classes; the legend is below.

    Args:
        classes: (H, W) integers, of the image's size.
        names: Of the classes.
    """
    colors = class_colors(len(names))
    pixels = np.asarray(image, np.float32)
    overlay = ((1 - OPACITY) * pixels + OPACITY * colors[classes]).round().astype(np.uint8)
    factor = max(1, -(-MIN_WIDTH // image.width))
    width, height = factor * image.width, factor * image.height
    counts = np.bincount(classes.ravel(), minlength=len(names))
    shown_classes = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number]]
    entries: list[tuple[str, float, tuple[int, ...]]] = [
        (names[int(i)], int(counts[i]) / classes.size, tuple(colors[i].tolist())) for i in shown_classes
    ]

    style = text_style(2 * width, width)
    columns = max(1, (2 * width + GAP) // (LEGEND_COLUMN * style.size // 14))
    column_width = (2 * width + GAP) // columns
    shown = entries[: MAX_ENTRIES - 1] if len(entries) > MAX_ENTRIES else entries
    texts = [f"{name.split(',')[0].split(';')[0]} {_percent(share)}" for name, share, _ in shown]
    if len(shown) < len(entries):
        texts.append(f"{len(entries) - len(shown)} more {sum(share for _, share, _ in entries[len(shown) :]):.1%}")
    rows = -(-len(texts) // columns)
    top = MARGIN + height + MARGIN
    picture = Image.new("RGB", (2 * width + GAP + 2 * MARGIN, top + rows * style.line_height + MARGIN), "white")
    picture.paste(image.resize((width, height), Image.Resampling.BICUBIC), (MARGIN, MARGIN))
    enlarged = Image.fromarray(overlay).resize((width, height), Image.Resampling.NEAREST)
    picture.paste(enlarged, (MARGIN + width + GAP, MARGIN))
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(texts):
        column, row = divmod(number, rows)
        x, y = MARGIN + column * column_width, top + row * style.line_height
        if number < len(shown):
            draw.rectangle((x, y + 2, x + style.size, y + style.size), shown[number][2])
        x += round(1.5 * style.size)
        draw.text((x, y), _shorten(text, column_width - 2 * style.size, style), INK, style.font)
    return picture


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def _shorten(text: str, width: float, style) -> str:
    """Cut a class name, before its percentage, to what fits into `width` pixels."""
    name, _, share = text.rpartition(" ")
    while len(name) > 1 and style.font.getlength(f"{name} {share}") > width:
        name = name[:-2] + "…"
    return f"{name} {share}"
