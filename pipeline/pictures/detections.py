"""Drawing of detections: boxes, masks and class names."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SCORE = 0.5
"""Detections with a lower score are not drawn, as in detectron2's demo."""
MASK_OPACITY = 0.45
GOLDEN_RATIO = 0.618034


def draw_detections(
    image: Image.Image,
    boxes: np.ndarray,
    masks: np.ndarray,
    names: Sequence[str],
    scores: Sequence[float],
    min_score: float = MIN_SCORE,
) -> Image.Image:
    """Draw detections into a copy of an RGB image.

    Args:
        boxes: (n, 4), x1, y1, x2, y2 in pixels.
        masks: uint8 (n, H, W), 0 or 1.
        names: Class of each detection. Each class has its color.
        scores: In [0, 1].
    """
    drawn = [number for number, score in enumerate(scores) if score >= min_score]
    pixels = np.array(image, np.float32)
    for number in drawn:
        inside = masks[number].astype(bool)
        pixels[inside] = (1 - MASK_OPACITY) * pixels[inside] + MASK_OPACITY * np.array(class_color(names[number]))
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    size = max(10, round(min(image.size) / 32))
    font, line = ImageFont.load_default(size), max(1, round(size / 8))
    for number in drawn:
        x1, y1, x2, y2 = boxes[number].tolist()
        color = class_color(names[number])
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=color, width=line)
    for number in drawn:  # texts above all boxes
        text, color = f"{names[number]} {scores[number]:.0%}", class_color(names[number])
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        x = min(max(0, boxes[number][0]), max(0, image.width - (right - left) - 2 * line))
        y = max(0, boxes[number][1] - (bottom - top) - 2 * line)
        draw.rectangle((x, y, x + right - left + 2 * line, y + bottom - top + 2 * line), fill=color)
        dark = sum(color) > 3 * 128
        draw.text((x + line - left, y + line - top), text, fill="black" if dark else "white", font=font)
    return picture


def class_color(name: str) -> tuple[int, int, int]:
    """Return a bright color for a class, the same in every picture."""
    hue = sum(ord(letter) * 31**place for place, letter in enumerate(name)) * GOLDEN_RATIO % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
