"""The mosaic: upstream's measured values, and the direct warp against a plain canvas."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data.plain_mosaic import blended, canvas_of, warp_canvas
from utils.augmentations import Perspective, draw_perspective
from utils.dataset import DetectionDataset
from utils.mosaic import (
    MOST_ENLARGED,
    canvas_maps,
    draw_centre,
    frame_windows,
    mosaic,
    mosaic_labels,
    place_tiles,
    warp_tiles,
)

SIZE = 160


class FixedCentre:
    """A generator whose next two uniform draws are given."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def uniform(self, low: float, high: float) -> float:
        return self.values.pop(0)


def test_measured_mosaics(facts: dict, arrays: dict, reference_set: Path) -> None:
    data = DetectionDataset(reference_set, 64, augment=True, nc=4, show=False)
    number = {Path(data.path(i)).name: i for i in range(len(data))}
    for case in facts["mosaic_img64_train_LINEAR"]:
        chosen = [number[name] for name in case["tile_order_tl_tr_bl_br"]]
        image, labels = mosaic(
            lambda k, chosen=chosen: data.load_image(chosen[k]),
            [tuple(data.resized[i]) for i in chosen],
            [tuple(data.loaded[i]) for i in chosen],
            [data.index.rows(i) for i in chosen],
            [None] * 4,
            64,
            FixedCentre(case["yc"], case["xc"]),
            Perspective(),
        )
        np.testing.assert_allclose(labels, case["labels_cls_xyxy"], atol=1e-4)
        # this draw moves whole pixels only, so nothing is blended anywhere, seams included
        difference = np.abs(image[..., :3].astype(int) - arrays[f"mosaic/{case['name']}"][..., ::-1])
        assert difference.max() <= 2, case["name"]


def smooth_images(count: int = 4) -> list[np.ndarray]:
    """Textured pictures of different shapes, without jumps from pixel to pixel."""
    images = []
    for seed in range(count):
        shape = ((120, 160), (160, 107), (90, 160), (160, 160))[seed % 4]
        noise = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
        images.append(cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX))
    return images


@pytest.mark.parametrize("gains", [(0, 0.1, 0.5, 0), (0, 0.1, 0.9, 0), (45, 0.2, 0.5, 10), (180, 0.1, 0.9, 20)])
def test_direct_warp_shows_what_the_canvas_would(gains: tuple) -> None:
    images = smooth_images()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        draw, centre = draw_perspective(rng, *gains), draw_centre(rng, SIZE)
        tiles = place_tiles(centre, [image.shape[:2] for image in images], SIZE)
        matrix = draw.matrix((2 * SIZE, 2 * SIZE), (SIZE, SIZE))
        direct = warp_tiles(lambda k: images[k], tiles, matrix, SIZE)[..., :3].astype(int)
        plain = warp_canvas(canvas_of(images, centre, SIZE), matrix, SIZE).astype(int)
        seam = blended(images, centre, matrix, SIZE, reach=2.05 if gains[0] else 1.05)
        difference = np.abs(direct - plain).max(2)
        assert seam.mean() < 0.2
        assert difference[~seam].max() <= 2


@pytest.mark.parametrize("density", [1, 2 / 3])
@pytest.mark.parametrize("scale", [0.5, 0.9])
def test_windows_show_what_the_canvas_would_but_for_a_pixel(scale: float, density: float) -> None:
    """The default augmentation resizes the file's pixels; edges are rounded to whole pixels, and nothing else moves."""
    images = smooth_images()
    shapes = [image.shape[:2] for image in images]
    loaded = [(round(h * density), round(w * density)) for h, w in shapes]
    files = [cv2.resize(image, hw[::-1], interpolation=cv2.INTER_AREA) for image, hw in zip(images, loaded)]
    used = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        draw = draw_perspective(rng, 0, 0.1, scale, 0)
        matrix = draw.matrix((2 * SIZE, 2 * SIZE), (SIZE, SIZE))
        centre = draw_centre(np.random.default_rng(seed), SIZE)
        windows = frame_windows(place_tiles(centre, shapes, SIZE), shapes, loaded, matrix, SIZE)
        assert (windows is None) == (draw.scale / density > MOST_ENLARGED * 1.01)
        if windows is None:
            continue
        used += 1
        arguments = (lambda k: files[k], shapes, loaded, [np.zeros((0, 5), np.float32)] * 4, [None] * 4, SIZE)
        direct, _ = mosaic(*arguments, np.random.default_rng(seed), draw)
        plain = warp_canvas(canvas_of(images, centre, SIZE), matrix, SIZE)
        away = ~blended(images, centre, matrix, SIZE, reach=3.05 / min(draw.scale, 1))
        assert ((direct == 114).all(2) == (plain == 114).all(2))[away].mean() > 0.999
        difference = np.abs(direct.astype(int) - plain)[away]
        assert difference.size == 0 or difference.mean() < 8  # of 255: the shift of a pixel, not of two
    assert used > 15


@pytest.mark.parametrize("density", [1, 0.7, 0.5])
def test_labels_of_windows_lie_on_their_pixels(density: float) -> None:
    """However the edges are rounded, a box of the label file is where its pixels are, to half a pixel."""
    shapes = [(120, 160), (160, 107), (90, 160), (160, 160)]
    loaded = [(round(h * density), round(w * density)) for h, w in shapes]
    checked = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        images, rows = [], []
        for number, (h, w) in enumerate(loaded):
            x1, y1 = int(rng.integers(2, w // 2)), int(rng.integers(2, h // 2))
            x2, y2 = int(rng.integers(x1 + 12, w - 1)), int(rng.integers(y1 + 12, h - 1))
            image = np.zeros((h, w, 3), np.uint8)
            image[y1:y2, x1:x2, :] = 50 * number + 100
            images.append(image)
            box = [(x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h]
            rows.append(np.float32([[number, *box]]))
        draw = draw_perspective(rng, 0, 0.1, 0.5, 0)
        if draw.scale / density > MOST_ENLARGED * 0.99:
            continue
        image, labels = mosaic(images.__getitem__, shapes, loaded, rows, [None] * 4, SIZE, rng, draw)
        assert image.shape == (SIZE, SIZE, 3)
        for cls, *corners in labels:
            # half the brightness is where the edge of the box lies
            level = 50 * int(cls) + 100
            inner = np.round(np.array(corners)).astype(int).clip(0, SIZE)
            patch = image[inner[1] : inner[3], inner[0] : inner[2], 0].astype(int)
            if patch.size > 100:
                checked += 1
                middle = image[(inner[1] + inner[3]) // 2, inner[0] : inner[2], 0].astype(int)
                assert middle[0] > level * 0.2 and middle[-1] > level * 0.2
                outside = [c for c in (inner[0] - 2, inner[2] + 1) if 0 <= c < SIZE]
                row = (inner[1] + inner[3]) // 2
                assert all(abs(int(image[row, c, 0]) - level) > level * 0.2 for c in outside)
    assert checked > 60


def test_no_grey_line_between_tiles() -> None:
    images = [np.full((SIZE, SIZE, 3), 255, np.uint8)] * 4
    for seed in range(20):
        rng = np.random.default_rng(seed)
        draw, centre = Perspective(angle=rng.uniform(-40, 40), scale=rng.uniform(1.6, 3)), (SIZE, SIZE)
        tiles = place_tiles(centre, [(SIZE, SIZE)] * 4, SIZE)
        frame = warp_tiles(lambda k: images[k], tiles, draw.matrix((2 * SIZE, 2 * SIZE), (SIZE, SIZE)), SIZE)
        assert (frame[..., :3] == 255).all()


def test_images_out_of_sight_are_not_read() -> None:
    tiles = place_tiles((80, 80), [(SIZE, SIZE)] * 4, SIZE)
    matrix = Perspective(scale=1.5, translate_x=0.1, translate_y=0.1).matrix((2 * SIZE, 2 * SIZE), (SIZE, SIZE))
    read: list[int] = []

    def load(place: int) -> np.ndarray:
        read.append(place)
        return np.zeros((SIZE, SIZE, 3), np.uint8)

    warp_tiles(load, tiles, matrix, SIZE)
    assert read == [3]


def test_polygons_follow_their_tile_and_perspective_uses_the_canvas() -> None:
    square = np.float32([(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)])
    rows = [np.float32([[1, 0.5, 0.5, 0.5, 0.5]]), np.float32([[2, 0.5, 0.5, 0.2, 0.2]])] + [
        np.zeros((0, 5), np.float32)
    ] * 2
    shapes = [(SIZE, SIZE)] * 4
    tiles = place_tiles((SIZE, SIZE), shapes, SIZE)
    boxes, polygons = mosaic_labels(canvas_maps(tiles, shapes), rows, [[square], None, None, None], SIZE)
    assert len(polygons) == len(boxes) == 2 and len(polygons[1]) == 0
    np.testing.assert_allclose([*polygons[0].min(0), *polygons[0].max(0)], boxes[0, 1:], atol=1e-3)
    draw = Perspective(perspective_x=2e-4, perspective_y=-1e-4)
    images = smooth_images()
    arguments = (
        lambda k: np.resize(images[3], (SIZE, SIZE, 3)),
        shapes,
        shapes,
        rows,
        [[square], None, None, None],
        SIZE,
    )
    image, labels = mosaic(*arguments, np.random.default_rng(0), draw)
    assert image.shape == (SIZE, SIZE, 3) and np.isfinite(labels).all()
    pasted, more = mosaic(*arguments, np.random.default_rng(0), Perspective(scale=0.6), 1.0)
    assert pasted.shape == (SIZE, SIZE, 3) and (more[:, 0] == 1).sum() == 2
