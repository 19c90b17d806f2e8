"""Placement of images on a canvas: flip, resize, then crop or pad; shared by an image and its annotation.

Invariant: a point (x, y) of the stored image, in pixels from its upper left corner, lands on the canvas at
`Placement.map_points`; `dali.placed_pipeline_def` puts the pixels there.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

Target = dict[str, Any]
"""What a model is trained towards for one image: tensors by name; other values stay on the host."""


class Placement(NamedTuple):
    """Where one image lands on a canvas. All numbers are in pixels."""

    stored: tuple[int, int]
    """Width and height of the stored image."""
    size: tuple[int, int]
    """Width and height after the resize, which follows the flip."""
    corner: tuple[int, int] = (0, 0)
    """x and y of the canvas's upper left corner in the resized image, not negative. What the resized image does not
    cover at the right and at the bottom is filled with the mean color, 0 after normalization."""
    canvas: tuple[int, int] = (0, 0)
    """Width and height of the canvas; (0, 0): those of the resized image."""
    flip: bool = False
    """Whether the stored image is flipped horizontally."""

    @property
    def extent(self) -> tuple[int, int]:
        """Width and height of the part of the canvas that the image covers."""
        width, height = (
            min(size - corner, canvas or size)
            for size, corner, canvas in zip(self.size, self.corner, self.canvas, strict=True)
        )
        return width, height

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """Map points (..., 2), x and y, of the stored image to the canvas; they may lie outside of it."""
        points = np.asarray(points, np.float64)
        if self.flip:
            points = np.array([self.stored[0], 0.0]) + points * [-1.0, 1.0]
        return points * (np.array(self.size) / self.stored) - self.corner

    def map_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes (n, 4), x1, y1, x2, y2, of the stored image to the canvas, without clipping them."""
        corners = self.map_points(np.asarray(boxes, np.float64).reshape(-1, 2, 2))
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)

    def unmap_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes (n, 4) of the canvas back to the stored image; only for images that are not flipped."""
        assert not self.flip
        points = (np.asarray(boxes, np.float64).reshape(-1, 2, 2) + self.corner) * self.stored / self.size
        return points.reshape(-1, 4)


class DenseTransform(Protocol):
    """Reads the annotation of a sample and draws its placement. A pure function of its arguments; thread-safe."""

    @property
    def extension(self) -> str:
        """Extension of the sample's file with the annotation: "json" or "png"."""
        ...

    def __call__(
        self, annotation: np.ndarray, image_size: tuple[int, int], epoch: int, sample_id: int
    ) -> tuple[Placement, Target]:
        """Return placement and target.

        Args:
            annotation: Content of the file, uint8 (bytes,).
            image_size: Width and height of the stored image in pixels.
            epoch, sample_id: Keys of the random numbers (`philox`).

        Raises:
            ValueError: If the annotation is damaged or does not belong to the image.
        """
        ...


def to_device(targets: list[Target], device: torch.device) -> list[Target]:
    """Move the tensors of targets to the device without waiting."""
    return [
        {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in target.items()
        }
        for target in targets
    ]


def pin(target: Target) -> Target:
    """Move the tensors of a target to page-locked memory, from which copies to a GPU are asynchronous."""
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in target.items()}
