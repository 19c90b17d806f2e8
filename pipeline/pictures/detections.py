"""Drawing of detections: boxes, masks and class names."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SCORE = 0.5
"""Lowest score of detections to draw, as in detectron2's demo."""
MASK_OPACITY = 0.45
GOLDEN_RATIO = 0.618034


def draw_detections(
    image: Image.Image, boxes: np.ndarray, masks: Sequence[np.ndarray], names: Sequence[str], scores: Sequence[float]
) -> Image.Image:
    """Draw detections into a copy of an RGB image.

    Args:
        boxes: (n, 4), x1, y1, x2, y2 in pixels.
        masks: n masks, uint8 (H, W), 0 or 1.
        names: Class of each detection.
        scores: In [0, 1].
    """
    drawn = sorted(range(len(scores)), key=lambda number: -int(masks[number].sum()))  # small ones above large ones
    colors = np.array([instance_color(number) for number in range(len(scores))], np.float32).reshape(-1, 3)
    top = np.full((image.height, image.width), -1)  # each pixel is colored once, so that the image stays visible
    for number in drawn:
        top[masks[number].astype(bool)] = number
    pixels, inside = np.array(image, np.float32), top >= 0
    pixels[inside] = (1 - MASK_OPACITY) * pixels[inside] + MASK_OPACITY * colors[top[inside]]
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    size = max(10, round(min(image.size) / 32))
    font, line = ImageFont.load_default(size), max(1, round(size / 8))
    for number in drawn:
        x1, y1, x2, y2 = boxes[number].tolist()
        color = instance_color(number)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=color, width=line)
    for number in drawn:  # texts above all boxes
        text, color = f"{names[number]} {scores[number]:.0%}", instance_color(number)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        x = min(max(0, boxes[number][0]), max(0, image.width - (right - left) - 2 * line))
        y = max(0, boxes[number][1] - (bottom - top) - 2 * line)
        draw.rectangle((x, y, x + right - left + 2 * line, y + bottom - top + 2 * line), fill=color)
        dark = sum(color) > 3 * 128
        draw.text((x + line - left, y + line - top), text, fill="black" if dark else "white", font=font)
    return picture


def instance_color(number: int) -> tuple[int, int, int]:
    """Return a bright color; those of consecutive numbers differ clearly."""
    red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN_RATIO % 1, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
