"""Boxes by size and by shape: which bins, and which bin a box is in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COCO_AREAS = (32.0**2, 96.0**2)
"""Square pixels of the original image where COCO's medium and large boxes begin."""

LEAST_SHARE = 0.05
"""COCO's bins are used where each holds this share of the boxes; elsewhere they would say little."""

RATIOS = (1.5, 3.0)
"""Longer by shorter side where oblong and elongated boxes begin."""


@dataclass(frozen=True)
class Bins:
    """Neighbouring bins of a number: ``names`` has one more entry than ``edges``. A value at an edge is in the upper
    bin. ``note``: what the bins are, in words."""

    kind: str
    names: tuple[str, ...]
    edges: tuple[float, ...]
    note: str

    def index(self, boxes: np.ndarray) -> np.ndarray:
        """(n,) bin of each of ``boxes`` (n, 4) x1, y1, x2, y2 in pixels of the original image."""
        return np.searchsorted(self.edges, areas(boxes) if self.kind == "size" else ratios(boxes), side="right")


def areas(boxes: np.ndarray) -> np.ndarray:
    """(n,) float64 square pixels of (n, 4) corner boxes."""
    sides = np.asarray(boxes, np.float64)[:, 2:4] - np.asarray(boxes, np.float64)[:, :2]
    return sides.clip(0).prod(1)


def ratios(boxes: np.ndarray) -> np.ndarray:
    """(n,) float64 longer by shorter side of (n, 4) corner boxes, at least 1; a side counts as a pixel or more."""
    sides = (np.asarray(boxes, np.float64)[:, 2:4] - np.asarray(boxes, np.float64)[:, :2]).clip(1)
    return sides.max(1) / sides.min(1)


def size_bins(boxes: np.ndarray) -> Bins:
    """Bins for labelled boxes (n, 4): COCO's where each has LEAST_SHARE of them, else thirds of the boxes by area."""
    area = areas(boxes)
    shares = np.bincount(np.searchsorted(COCO_AREAS, area, side="right"), minlength=3) / max(len(area), 1)
    if shares.min() >= LEAST_SHARE or not len(area):
        note = "COCO's sizes: small below 32x32 pixels of the original image, large from 96x96"
        return Bins("size", ("small", "medium", "large"), COCO_AREAS, note)
    edges = tuple(float(edge) for edge in np.quantile(area, [1 / 3, 2 / 3]))
    shown = " and ".join(f"{edge**0.5:.0f}x{edge**0.5:.0f}" for edge in edges)
    note = f"thirds of the boxes by area, divided at {shown} pixels of the original image (a bin of COCO's sizes is "
    return Bins("size", ("small third", "middle third", "large third"), edges, f"{note}nearly empty here)")


def ratio_bins() -> Bins:
    """Bins of the ratio of sides."""
    names = (f"up to {RATIOS[0]:g}:1", f"{RATIOS[0]:g}:1 to {RATIOS[1]:g}:1", f"{RATIOS[1]:g}:1 and longer")
    return Bins("aspect ratio", names, RATIOS, "longer by shorter side of the labelled box")
