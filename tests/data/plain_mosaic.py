"""The mosaic the plain way, to compare with: paint a canvas of twice the size, then warp all of it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np


def tile_rects(images: Sequence[np.ndarray], centre: tuple[int, int], size: int) -> list[tuple[int, ...]]:
    """Where each image lies on the canvas: left, top of the whole image, then x1, y1, x2, y2 of what shows."""
    (yc, xc), rects = centre, []
    for place, image in enumerate(images):
        h, w = image.shape[:2]
        left, top = (xc - w if place in (0, 2) else xc), (yc - h if place in (0, 1) else yc)
        rects.append((left, top, max(left, 0), max(top, 0), min(left + w, 2 * size), min(top + h, 2 * size)))
    return rects


def canvas_of(images: Sequence[np.ndarray], centre: tuple[int, int], size: int) -> np.ndarray:
    """The (2 size, 2 size, 3) canvas with four images around ``centre`` (y, x)."""
    canvas = np.full((2 * size, 2 * size, 3), 114, np.uint8)
    for image, (left, top, x1, y1, x2, y2) in zip(images, tile_rects(images, centre, size)):
        if x2 > x1 and y2 > y1:
            canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
    return canvas


def warp_canvas(canvas: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """What the frame shows of the canvas."""
    return cv2.warpAffine(canvas, matrix[:2], (size, size), borderValue=(114,) * 3)


def blended(
    images: Sequence[np.ndarray], centre: tuple[int, int], matrix: np.ndarray, size: int, reach: float
) -> np.ndarray:
    """(size, size) bool: pixels of the frame within ``reach`` canvas pixels of the edge of an image.

    At 1 these are the pixels that bilinear sampling mixes with the neighbour or with the grey around.
    """
    ys, xs = np.mgrid[:size, :size]
    x, y = np.tensordot(np.linalg.inv(matrix)[:2], np.stack((xs, ys, np.ones_like(xs))), 1)
    mixed = np.zeros((size, size), bool)
    for _, _, x1, y1, x2, y2 in tile_rects(images, centre, size):
        outer = (x > x1 - reach) & (x < x2 - 1 + reach) & (y > y1 - reach) & (y < y2 - 1 + reach)
        margin = reach - 1
        inner = (x > x1 + margin) & (x < x2 - 1 - margin) & (y > y1 + margin) & (y < y2 - 1 - margin)
        mixed |= outer & ~inner
    return mixed
