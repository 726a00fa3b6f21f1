"""Augmentations as pure functions: what is drawn comes from an explicit numpy Generator, what is applied from numbers.

Images are (H, W, 3) uint8 RGB. Boxes are (n, 4) pixels x1, y1, x2, y2; labels are (n, 5): class, then the box.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np

GREY = 114
"""Value of the pixels that no image covers."""

MIN_AREA = 0.10
MIN_AREA_POLYGON = 0.01
_STRIP_PIXELS = 40_000  # 120 kB a strip: three of them fit in a core's cache
_RESAMPLED = 1000  # points of a polygon that is to be warped


@dataclass(frozen=True)
class Letterbox:
    """How an image came into the network's frame: all that maps boxes back.

    ``original``: (height, width) of the image file. ``ratio``: network pixels per image pixel along x and y.
    ``pad``: left and top margin, halves of what was left over, before rounding to whole pixels.
    """

    original: tuple[int, int]
    ratio: tuple[float, float] = (1.0, 1.0)
    pad: tuple[float, float] = (0.0, 0.0)


class Fit(NamedTuple):
    """Geometry of a letterbox: scaled size (w, h), margins in whole pixels, the ratio and unrounded half margins."""

    size: tuple[int, int]
    top: int
    bottom: int
    left: int
    right: int
    ratio: tuple[float, float]
    pad: tuple[float, float]


def letterbox_fit(
    hw: tuple[int, int],
    new_shape: int | tuple[int, int] = 640,
    auto: bool = True,
    scale_fill: bool = False,
    scaleup: bool = True,
    stride: int = 32,
) -> Fit:
    """Where an image of (height, width) goes in a frame of ``new_shape`` (a side, or (height, width)).

    ``auto``: margins only up to the next multiple of ``stride``. ``scale_fill``: stretch, no margins. Without
    ``scaleup`` small images keep their size.
    """
    (h, w), (height, width) = hw, (new_shape, new_shape) if isinstance(new_shape, int) else new_shape
    gain = min(height / h, width / w)
    if not scaleup:
        gain = min(gain, 1.0)
    ratio, size = (gain, gain), (max(round(w * gain), 1), max(round(h * gain), 1))  # a 1 x 3000 picture keeps its row
    dw, dh = float(width - size[0]), float(height - size[1])
    if auto:
        dw, dh = dw % stride, dh % stride
    elif scale_fill:
        ratio, size, dw, dh = (width / w, height / h), (width, height), 0.0, 0.0
    dw, dh = dw / 2, dh / 2
    # a tenth off and on: an odd margin puts its extra pixel at the bottom and right
    top, bottom, left, right = round(dh - 0.1), round(dh + 0.1), round(dw - 0.1), round(dw + 0.1)
    return Fit(size, top, bottom, left, right, ratio, (dw, dh))


def letterbox(
    image: np.ndarray,
    new_shape: int | tuple[int, int] = 640,
    *,
    auto: bool = True,
    scale_fill: bool = False,
    scaleup: bool = True,
    stride: int = 32,
) -> tuple[np.ndarray, Letterbox]:
    """Scale an image into a frame, keeping its proportions, with grey margins; see :func:`letterbox_fit`.

    Returns the (H', W', 3) image and the :class:`Letterbox` that maps boxes back.
    """
    hw = image.shape[:2]
    fit = letterbox_fit(hw, new_shape, auto, scale_fill, scaleup, stride)
    if fit.size != (hw[1], hw[0]):
        image = cv2.resize(image, fit.size, interpolation=cv2.INTER_LINEAR)
    if fit.top or fit.bottom or fit.left or fit.right:
        margins = (fit.top, fit.bottom, fit.left, fit.right)
        image = cv2.copyMakeBorder(image, *margins, cv2.BORDER_CONSTANT, value=(GREY,) * 3)
    return image, Letterbox(hw, fit.ratio, fit.pad)


class Perspective(NamedTuple):
    """One draw of the geometric augmentation: bottom-row terms, degrees, factor, degrees, centre in fractions."""

    perspective_x: float = 0.0
    perspective_y: float = 0.0
    angle: float = 0.0
    scale: float = 1.0
    shear_x: float = 0.0
    shear_y: float = 0.0
    translate_x: float = 0.5
    translate_y: float = 0.5

    def matrix(self, in_hw: tuple[int, int], out_hw: tuple[int, int]) -> np.ndarray:
        """(3, 3) float64 map of input pixels (x, y, 1) to output pixels: T · S · R · P · C."""
        centre, perspective, shear, translate = np.eye(3), np.eye(3), np.eye(3), np.eye(3)
        centre[:2, 2] = -in_hw[1] / 2, -in_hw[0] / 2
        perspective[2, :2] = self.perspective_x, self.perspective_y
        cos = math.cos(math.radians(self.angle)) * self.scale
        sin = math.sin(math.radians(self.angle)) * self.scale
        rotate = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])  # counter-clockwise as seen, y down
        shear[0, 1], shear[1, 0] = math.tan(math.radians(self.shear_x)), math.tan(math.radians(self.shear_y))
        translate[:2, 2] = self.translate_x * out_hw[1], self.translate_y * out_hw[0]
        return translate @ shear @ rotate @ perspective @ centre


def draw_perspective(
    rng: np.random.Generator,
    degrees: float = 0.0,
    translate: float = 0.1,
    scale: float = 0.5,
    shear: float = 0.0,
    perspective: float = 0.0,
) -> Perspective:
    """Draw one within these gains: angles in degrees, ``translate`` as a fraction of the frame."""
    return Perspective(
        *rng.uniform(-perspective, perspective, 2),
        rng.uniform(-degrees, degrees),
        rng.uniform(1 - scale, 1 + scale),
        *rng.uniform(-shear, shear, 2),
        *rng.uniform(0.5 - translate, 0.5 + translate, 2),
    )


def is_affine(matrix: np.ndarray) -> bool:
    """True when the bottom row is 0, 0, 1 (no perspective)."""
    return matrix[2, 0] == 0 and matrix[2, 1] == 0


def warp(image: np.ndarray, matrix: np.ndarray, out_hw: tuple[int, int]) -> np.ndarray:
    """``image`` seen through a (3, 3) matrix, bilinear, as (*out_hw, 3); uncovered pixels are grey."""
    height, width = out_hw
    if image.shape[:2] == tuple(out_hw) and np.array_equal(matrix, np.eye(3)):
        return image
    # OpenCV warps four channels more than twice as fast as three, to the same values
    four = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    if is_affine(matrix):
        four = cv2.warpAffine(four, matrix[:2], (width, height), borderValue=(GREY,) * 4)
    else:
        four = cv2.warpPerspective(four, matrix, (width, height), borderValue=(GREY,) * 4)
    return cv2.cvtColor(four, cv2.COLOR_RGBA2RGB)


def warp_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(n, 2) pixels x, y through a (3, 3) matrix -> (n, 2) float64."""
    moved = points @ matrix[:2, :2].T + matrix[:2, 2]
    return moved if is_affine(matrix) else moved / (points @ matrix[2, :2] + matrix[2, 2])[:, None]


def warp_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(n, 4) boxes through a (3, 3) matrix: the upright box around the four moved corners, not clipped."""
    corners = boxes[:, [0, 1, 2, 3, 0, 3, 2, 1]].reshape(-1, 2)
    moved = warp_points(corners, matrix).reshape(-1, 4, 2)
    return np.concatenate((moved.min(1), moved.max(1)), 1)


def warp_segment(segment: np.ndarray, matrix: np.ndarray, out_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A (k, 2) polygon through a (3, 3) matrix: its dense outline inside the frame, and the box around that.

    Returns ((m, 2), (4,)); the box is zeros when nothing of the outline is inside.
    """
    points = warp_points(resample_segment(segment), matrix)
    height, width = out_hw
    inside = (points >= 0).all(1) & (points[:, 0] <= width) & (points[:, 1] <= height)
    points = points[inside]
    return points, np.concatenate((points.min(0), points.max(0))) if len(points) else np.zeros(4)


def resample_segment(segment: np.ndarray, count: int = _RESAMPLED) -> np.ndarray:
    """A closed (k, 2) polygon as ``count`` points, evenly over its corners."""
    closed = np.concatenate((segment, segment[:1]))
    where, corners = np.linspace(0, len(closed) - 1, count), np.arange(len(closed))
    return np.stack([np.interp(where, corners, closed[:, axis]) for axis in (0, 1)], 1)


def warp_labels(
    labels: np.ndarray,
    segments: list[np.ndarray] | None,
    draw: Perspective,
    matrix: np.ndarray,
    out_hw: tuple[int, int],
) -> np.ndarray:
    """Labels (n, 5) in pixels as :func:`warp` moves their image, without those that hardly remain.

    A label with a polygon takes the box around its moved outline, which is tighter than the moved box.
    """
    if not len(labels):
        return labels
    height, width = out_hw
    moved = np.clip(warp_boxes(labels[:, 1:5], matrix), 0, (width, height, width, height))
    min_area = np.full(len(labels), MIN_AREA)
    for row, segment in enumerate(segments or ()):
        if len(segment):
            moved[row] = warp_segment(segment, matrix, out_hw)[1]
            min_area[row] = MIN_AREA_POLYGON
    keep = keep_boxes(labels[:, 1:5] * draw.scale, moved, min_area)
    return np.concatenate((labels[keep, :1], moved[keep]), 1).astype(np.float32)


def keep_boxes(before: np.ndarray, after: np.ndarray, min_area: float | np.ndarray = MIN_AREA) -> np.ndarray:
    """(n,) bool: boxes that are still worth learning. ``before`` and ``after`` (n, 4), in output pixels.

    Kept: over 2 pixels wide and high, more than ``min_area`` of the former area, sides within 1 : 100.
    """
    w0, h0 = before[:, 2] - before[:, 0], before[:, 3] - before[:, 1]
    w, h = after[:, 2] - after[:, 0], after[:, 3] - after[:, 1]
    aspect = np.maximum(w / (h + 1e-16), h / (w + 1e-16))
    return (w > 2) & (h > 2) & (w * h / (w0 * h0 + 1e-16) > min_area) & (aspect < 100)


def draw_hsv(rng: np.random.Generator, gains: tuple[float, float, float]) -> np.ndarray:
    """(3,) factors of hue, saturation and value: 1 plus or minus each gain."""
    return rng.uniform(-1, 1, 3) * gains + 1


def apply_hsv(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """:func:`finish` without mirroring."""
    return finish(image, factors, False, False)


def finish(
    image: np.ndarray, factors: np.ndarray, up_down: bool, left_right: bool, out: np.ndarray | None = None
) -> np.ndarray:
    """An RGB (or RGBA) image mirrored, with hue, saturation and value multiplied, as (H, W, 3) RGB, in ``out``.

    In OpenCV's 8-bit HSV: hue 0..179 goes round, the others stop at 255; fractions are cut off. Done in strips of
    rows: what one step writes, the next finds in the cache.
    """
    height, width = image.shape[:2]
    out = np.empty((height, width, 3), np.uint8) if out is None else out
    recolour = _recolouring(np.asarray(factors, np.float64))
    mirror = -1 if up_down and left_right else int(left_right) if up_down or left_right else None
    rows = max(_STRIP_PIXELS // max(width, 1), 1)
    for first in range(0, height, rows):
        strip = image[first : first + rows]
        last = first + len(strip)
        if mirror is not None:
            strip = cv2.flip(strip, mirror)
        recolour(strip, out[height - last : height - first] if up_down else out[first:last])
    return out


def _recolouring(factors: np.ndarray) -> Callable[[np.ndarray, np.ndarray], object]:
    """What turns a strip into its place in the result."""
    if (factors == 1).all():
        return _copy_rgb
    if 0 <= factors[0] * 179 < 256:  # fits in a byte; hues over 180 go round in the way back to RGB
        scale = np.zeros((3, 4), np.float32)
        np.fill_diagonal(scale, factors)
        scale[:, 3] = -0.4999  # the result is rounded: this cuts fractions off
        change = partial(cv2.transform, m=scale)
    else:
        tables = np.stack(hsv_tables(factors), 1)[None]
        change = partial(cv2.LUT, lut=tables)

    def recolour(strip: np.ndarray, out: np.ndarray) -> None:
        cv2.cvtColor(change(cv2.cvtColor(strip, cv2.COLOR_RGB2HSV)), cv2.COLOR_HSV2RGB, dst=out)

    return recolour


def _copy_rgb(strip: np.ndarray, out: np.ndarray) -> None:
    if strip.shape[2] == 3:
        np.copyto(out, strip)
    else:
        cv2.cvtColor(strip, cv2.COLOR_RGBA2RGB, dst=out)


def hsv_tables(factors: np.ndarray) -> list[np.ndarray]:
    """The three (256,) uint8 look-up tables that :func:`finish` amounts to."""
    x = np.arange(256, dtype=np.float64)
    tables = [(x * factors[0]) % 180, np.clip(x * factors[1], 0, 255), np.clip(x * factors[2], 0, 255)]
    return [table.astype(np.uint8) for table in tables]


def flip_labels(labels: np.ndarray, up_down: bool, left_right: bool) -> np.ndarray:
    """Labels (n, 5) class, cx, cy, w, h in 0..1 of the mirrored image; a new array where it is."""
    if not (up_down or left_right):
        return labels
    labels = labels.copy()
    if left_right:
        labels[:, 1] = 1 - labels[:, 1]
    if up_down:
        labels[:, 2] = 1 - labels[:, 2]
    return labels


def mixup(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two (image, labels) blended, ``share`` of the first; labels of both. Zhang et al., arXiv 1710.09412."""
    blended = cv2.addWeighted(a[0], share, b[0], 1 - share, -0.4999)  # rounded: cuts fractions off
    return blended, np.concatenate((a[1], b[1]))


def copy_paste(
    image: np.ndarray, labels: np.ndarray, segments: list[np.ndarray], share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Paste the mirror image of some polygons where they cover no label by 30 %. Ghiasi et al., arXiv 2012.07177.

    ``labels`` (n, 5) class and box in pixels, one (k, 2) polygon each (empty ones take no part). Returns image,
    labels and polygons, grown by the copies; the input is not changed.
    """
    candidates = [row for row, segment in enumerate(segments) if len(segment)]
    count = round(share * len(candidates))
    if not count:
        return image, labels, segments
    width = image.shape[1]
    mask = np.zeros(image.shape[:2], np.uint8)
    labels, segments = labels.copy(), list(segments)
    for row in rng.choice(candidates, count, replace=False):
        cls, x1, y1, x2, y2 = labels[row]
        mirrored = np.array([cls, width - x2, y1, width - x1, y2], labels.dtype)
        if (_covered(labels[:, 1:5], mirrored[1:]) >= 0.30).any():
            continue
        labels = np.concatenate((labels, mirrored[None]))
        segments.append(np.stack((width - segments[row][:, 0], segments[row][:, 1]), 1))
        cv2.drawContours(mask, [segments[row].astype(np.int32)], -1, 1, cv2.FILLED)
    image, chosen = image.copy(), cv2.flip(mask, 1) > 0
    image[chosen] = cv2.flip(image, 1)[chosen]
    return image, labels, segments


def _covered(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Share of each of ``boxes`` (n, 4) that ``box`` (4,) covers."""
    inter = np.clip(np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2]), 0, None).prod(1)
    return inter / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + 1e-16)
