"""The mosaic: upstream's measured values, and the direct warp against a plain canvas."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data.plain_mosaic import blended, canvas_of, warp_canvas
from utils.augmentations import Perspective, draw_perspective
from utils.dataset import DetectionDataset
from utils.mosaic import draw_centre, mosaic, mosaic_labels, place_tiles, warp_tiles

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
    boxes, polygons = mosaic_labels(tiles, shapes, rows, [[square], None, None, None], SIZE)
    assert len(polygons) == len(boxes) == 2 and len(polygons[1]) == 0
    np.testing.assert_allclose([*polygons[0].min(0), *polygons[0].max(0)], boxes[0, 1:], atol=1e-3)
    draw = Perspective(perspective_x=2e-4, perspective_y=-1e-4)
    images = smooth_images()
    arguments = (lambda k: np.resize(images[3], (SIZE, SIZE, 3)), shapes, rows, [[square], None, None, None], SIZE)
    image, labels = mosaic(*arguments, np.random.default_rng(0), draw)
    assert image.shape == (SIZE, SIZE, 3) and np.isfinite(labels).all()
    pasted, more = mosaic(*arguments, np.random.default_rng(0), Perspective(scale=0.6), 1.0)
    assert pasted.shape == (SIZE, SIZE, 3) and (more[:, 0] == 1).sum() == 2
