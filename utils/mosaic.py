"""Mosaic of four images (Bochkovskiy et al., arXiv 2004.10934, 3.1), warped into the training frame in one go.

Four images meet at a random point of a canvas of twice the training size; the geometric augmentation then looks at a
part of that canvas. As long as it is affine the canvas need not exist: each image is warped straight to its place,
and an image that the frame does not show is not even read. When it only scales and moves (no rotation, no shear, as
by default) "warped" means that a part of the file's own pixels is resized into its part of the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from utils.augmentations import GREY, Perspective, copy_paste, is_affine, warp, warp_labels, warp_points


class Tile(NamedTuple):
    """One image of a mosaic: its part ``source`` lies at ``target`` of the canvas, both x1, y1, x2, y2."""

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]

    @property
    def shift(self) -> tuple[int, int]:
        """What to add to a pixel of the image to get the pixel of the canvas."""
        return self.target[0] - self.source[0], self.target[1] - self.source[1]


def draw_centre(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """The point (yc, xc) of the canvas where the four images meet, in its middle half."""
    return int(rng.uniform(size / 2, 3 * size / 2)), int(rng.uniform(size / 2, 3 * size / 2))


def place_tiles(centre: tuple[int, int], shapes: Sequence[tuple[int, int]], size: int) -> list[Tile]:
    """Tiles of four images (h, w), in order top left, top right, bottom left, bottom right, on a 2 size canvas."""
    yc, xc = centre
    tiles = []
    for place, (h, w) in enumerate(shapes):
        x, y = xc - w * (place % 2 == 0), yc - h * (place < 2)  # corner of the whole image on the canvas
        target = (max(x, 0), max(y, 0), min(x + w, 2 * size), min(y + h, 2 * size))
        tiles.append(Tile((target[0] - x, target[1] - y, target[2] - x, target[3] - y), target))
    return tiles


class Window(NamedTuple):
    """What the frame shows of an image: its part ``source``, resized, fills ``target``; both x1, y1, x2, y2 in whole
    pixels, of the image as loaded and of the frame."""

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]


MOST_ENLARGED = 2
"""Frame pixels per image pixel up to which windows are used: they begin at whole pixels of the image, so their place
is off by half of this at most."""


def frame_windows(
    tiles: Sequence[Tile],
    shapes: Sequence[tuple[int, int]],
    loaded: Sequence[tuple[int, int]],
    matrix: np.ndarray,
    size: int,
) -> list[Window | None] | None:
    """The window of each tile, None for one out of sight; None altogether when the matrix turns, shears or mirrors, or
    an image must be enlarged too far.

    ``shapes`` (h, w) on the canvas, ``loaded`` (h, w) of the pixels there are.
    """
    gains = matrix[0, 0], matrix[1, 1]
    if not is_affine(matrix) or matrix[0, 1] or matrix[1, 0] or min(gains) <= 0:
        return None
    windows: list[Window | None] = []
    for tile, (h, w), (h0, w0) in zip(tiles, shapes, loaded):
        if max(gains[0] * w / w0, gains[1] * h / h0) > MOST_ENLARGED:
            return None
        x = _span(tile.target[0], tile.target[2], tile.shift[0], w0 / w, gains[0], matrix[0, 2], size)
        y = _span(tile.target[1], tile.target[3], tile.shift[1], h0 / h, gains[1], matrix[1, 2], size)
        windows.append(Window((x[0], y[0], x[1], y[1]), (x[2], y[2], x[3], y[3])) if x and y else None)
    return windows


def _span(
    first: float, last: float, shift: float, density: float, gain: float, offset: float, size: int
) -> tuple[int, int, int, int] | None:
    """One axis of a window: pixels from and to in the image, then in the frame; None when nothing shows.

    ``first``, ``last``, ``shift`` of the tile in canvas pixels; ``density``: image pixels per canvas pixel.
    """
    low, high = max(first, -offset / gain), min(last, (size - offset) / gain)
    source = round((low - shift) * density), round((high - shift) * density)
    target = round(low * gain + offset), round(high * gain + offset)
    return (*source, *target) if source[1] > source[0] and target[1] > target[0] else None


def canvas_maps(
    tiles: Sequence[Tile],
    shapes: Sequence[tuple[int, int]],
    loaded: Sequence[tuple[int, int]] = (),
    windows: Sequence[Window | None] | None = None,
    matrix: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """How coordinates 0..1 of each image become canvas pixels: (4, 2) float32 factors and (4, 2) float32 offsets.

    With ``windows`` they are those that, seen through ``matrix``, lie where the rounded windows show them.
    """
    scale, shift = [(float(w), float(h)) for h, w in shapes], [tile.shift for tile in tiles]
    for place, window in enumerate(windows or ()):
        if window is None:
            continue
        factors, offsets = [], []
        for axis in (0, 1):
            s1, s2, d1, d2 = (part[axis + end] for part in window for end in (0, 2))
            gain = (d2 - d1) / (s2 - s1)
            factors.append(loaded[place][1 - axis] * gain / matrix[axis, axis])
            offsets.append((d1 - s1 * gain - matrix[axis, 2]) / matrix[axis, axis])
        scale[place], shift[place] = tuple(factors), tuple(offsets)
    return np.array(scale, np.float32), np.array(shift, np.float32)


def mosaic_labels(
    maps: tuple[np.ndarray, np.ndarray],
    labels: Sequence[np.ndarray],
    segments: Sequence[list[np.ndarray] | None],
    size: int,
) -> tuple[np.ndarray, list[np.ndarray] | None]:
    """Labels of four images, each (n, 5) class, cx, cy, w, h in 0..1, as (N, 5) class, x1, y1, x2, y2 on the canvas.

    Polygons likewise: one for each label, empty for plain boxes, or None when there are none at all. ``maps`` as from
    :func:`canvas_maps`.
    """
    counts = [len(rows) for rows in labels]
    rows = np.concatenate(labels)
    scale, shift = (np.repeat(part, counts, 0) for part in maps)
    canvas = np.empty_like(rows)
    canvas[:, 0] = rows[:, 0]
    canvas[:, 1:3] = scale * (rows[:, 1:3] - rows[:, 3:5] / 2) + shift
    canvas[:, 3:5] = scale * (rows[:, 1:3] + rows[:, 3:5] / 2) + shift
    np.clip(canvas[:, 1:], 0, 2 * size, out=canvas[:, 1:])
    if all(s is None for s in segments):
        return canvas, None
    polygons: list[np.ndarray] = []
    for factor, offset, count, own in zip(*maps, counts, segments):
        for polygon in own or [np.zeros((0, 2), np.float32)] * count:
            polygons.append(np.clip(polygon * factor + offset, 0, 2 * size))
    return canvas, polygons


def mosaic(
    load: Callable[[int], np.ndarray],
    shapes: Sequence[tuple[int, int]],
    loaded: Sequence[tuple[int, int]],
    labels: Sequence[np.ndarray],
    segments: Sequence[list[np.ndarray] | None],
    size: int,
    rng: np.random.Generator,
    draw: Perspective,
    paste_share: float = 0.0,
    frame: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A training image out of four.

    ``shapes`` (h, w) of the images on the canvas; ``load(k)`` gives image k (0..3) as (*loaded[k], 3) uint8 and is
    called for visible images only; ``labels`` and ``segments`` as in :func:`mosaic_labels`; ``draw`` the geometric
    augmentation; ``paste_share`` of the polygons is pasted, mirrored, see :func:`copy_paste`; ``frame``: memory that
    an image of three channels is made in. Returns the image, (size, size, 4) RGBA or (size, size, 3) RGB uint8, and
    labels (n, 5) class, x1, y1, x2, y2 in its pixels.
    """
    tiles = place_tiles(draw_centre(rng, size), shapes, size)
    matrix = draw.matrix((2 * size, 2 * size), (size, size))
    pasting = bool(paste_share and any(segments))
    windows = None if pasting else frame_windows(tiles, shapes, loaded, matrix, size)
    boxes, polygons = mosaic_labels(canvas_maps(tiles, shapes, loaded, windows, matrix), labels, segments, size)
    if windows is not None:
        image = fill_windows(load, windows, size, frame)
    elif pasting or not is_affine(matrix):
        canvas = paste_tiles(lambda k: _sized(load(k), shapes[k]), tiles, size)
        if pasting:
            canvas, boxes, polygons = copy_paste(canvas, boxes, polygons, paste_share, rng)
        image = warp(canvas, matrix, (size, size))
    else:
        image = warp_tiles(lambda k: _sized(load(k), shapes[k]), tiles, matrix, size)
    return image, warp_labels(boxes, polygons, draw, matrix, (size, size))


def _sized(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The image with these (h, w)."""
    if image.shape[:2] == shape:
        return image
    return cv2.resize(image, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def fill_windows(
    load: Callable[[int], np.ndarray], windows: Sequence[Window | None], size: int, frame: np.ndarray | None = None
) -> np.ndarray:
    """The frame (size, size, 3) with the visible images in their windows, the rest grey."""
    frame = np.empty((size, size, 3), np.uint8) if frame is None else frame
    frame[:] = GREY
    for place, window in enumerate(windows):
        if window is not None:
            (sx1, sy1, sx2, sy2), (x1, y1, x2, y2) = window
            part = load(place)[sy1:sy2, sx1:sx2]
            cv2.resize(part, (x2 - x1, y2 - y1), dst=frame[y1:y2, x1:x2], interpolation=cv2.INTER_LINEAR)
    return frame


def paste_tiles(load: Callable[[int], np.ndarray], tiles: Sequence[Tile], size: int) -> np.ndarray:
    """The whole canvas, (2 size, 2 size, 3): for what needs it, pasting polygons and true perspective."""
    canvas = np.full((2 * size, 2 * size, 3), GREY, np.uint8)
    for place, tile in enumerate(tiles):
        (sx1, sy1, sx2, sy2), (x1, y1, x2, y2) = tile
        if x2 > x1 and y2 > y1:
            canvas[y1:y2, x1:x2] = load(place)[sy1:sy2, sx1:sx2]
    return canvas


def warp_tiles(load: Callable[[int], np.ndarray], tiles: Sequence[Tile], matrix: np.ndarray, size: int) -> np.ndarray:
    """What :func:`warp` would show of the canvas through an affine matrix, as (size, size, 4) RGBA.

    Equal to it but within a canvas pixel (two, when turned) of where two tiles, or a tile and the grey, meet: there
    the canvas would blend them. Four channels because OpenCV warps them more than twice as fast as three.
    """
    frame = np.full((size, size, 4), GREY, np.uint8)
    for place, tile in enumerate(tiles):
        window = _shown_part(tile, matrix, size)
        if window is None:
            continue
        x1, y1, x2, y2 = window
        padded = _padded_rgba(load(place), tile.source)
        local = matrix[:2].copy()  # pixel (1, 1) of the padded tile is pixel target[:2] of the canvas
        local[:, 2] += local[:, :2] @ (np.array(tile.target[:2]) - 1) - (x1, y1)
        part = frame[y1:y2, x1:x2]
        cv2.warpAffine(padded, local, (x2 - x1, y2 - y1), dst=part, borderMode=cv2.BORDER_TRANSPARENT)
    return frame


def _shown_part(tile: Tile, matrix: np.ndarray, size: int) -> tuple[int, int, int, int] | None:
    """The frame's pixels x1, y1, x2, y2 around the moved tile, half a pixel more all round; None when it is outside."""
    x1, y1, x2, y2 = tile.target
    if x2 <= x1 or y2 <= y1:
        return None
    left, top, right, bottom = x1 - 0.5, y1 - 0.5, x2 - 0.5, y2 - 0.5
    corners = warp_points(np.array([(left, top), (right, top), (right, bottom), (left, bottom)]), matrix)
    low = np.maximum(np.ceil(corners.min(0)), 0).astype(int)
    high = np.minimum(np.ceil(corners.max(0)), size).astype(int)
    return None if (high <= low).any() else (int(low[0]), int(low[1]), int(high[0]), int(high[1]))


def _padded_rgba(image: np.ndarray, source: tuple[int, int, int, int]) -> np.ndarray:
    """A part of an RGB image as RGBA with its edge repeated once all round, so that tiles leave no gap."""
    x1, y1, x2, y2 = source
    padded = np.empty((y2 - y1 + 2, x2 - x1 + 2, 4), np.uint8)
    cv2.cvtColor(image[y1:y2, x1:x2], cv2.COLOR_RGB2RGBA, dst=padded[1:-1, 1:-1])
    padded[0], padded[-1] = padded[1], padded[-2]
    padded[:, 0], padded[:, -1] = padded[:, 1], padded[:, -2]
    return padded
