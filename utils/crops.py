"""Detections cut out of their picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

CROP_GAIN, CROP_MARGIN = 1.02, 10  # a crop is the box enlarged by 2 % and 10 pixels
WRITABLE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


def crop_box(
    image: np.ndarray, box: Sequence[float], gain: float = CROP_GAIN, margin: float = CROP_MARGIN
) -> np.ndarray:
    """The part of ``image`` (H, W, 3) inside ``box`` (x1, y1, x2, y2 in its pixels), enlarged about its centre.

    Width and height become side x ``gain`` + ``margin``, cut to the image. Returns a copy, at least 1 x 1 pixel.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(v) for v in box[:4])
    half_w, half_h = ((x2 - x1) * gain + margin) / 2, ((y2 - y1) * gain + margin) / 2
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    left = min(int(max(cx - half_w, 0)), width - 1)
    top = min(int(max(cy - half_h, 0)), height - 1)
    right, bottom = min(int(cx + half_w), width), min(int(cy + half_h), height)
    return image[top : max(bottom, top + 1), left : max(right, left + 1)].copy()


def picture_suffix(name: str) -> str:
    """The suffix to save the result of picture ``name`` with: its own where OpenCV writes it, else ``.jpg``."""
    suffix = Path(name).suffix
    return suffix if suffix.lower() in WRITABLE_SUFFIXES else ".jpg"
