"""Augmentations against values measured from upstream, with its draws put in."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.augmentations import (
    Perspective,
    apply_hsv,
    copy_paste,
    draw_hsv,
    draw_perspective,
    finish,
    flip_labels,
    hsv_tables,
    keep_boxes,
    letterbox,
    letterbox_fit,
    mixup,
    warp,
    warp_boxes,
    warp_labels,
)

MODES = {
    "auto640": {"new_shape": 640},
    "square640": {"new_shape": 640, "auto": False},
    "noup640": {"new_shape": 640, "auto": False, "scaleup": False},
    "auto_s64_1280": {"new_shape": 1280, "stride": 64},
    "rect_384x640": {"new_shape": (384, 640), "auto": False},
    "fill_320x416": {"new_shape": (320, 416), "auto": False, "scale_fill": True},
}


def test_letterbox_geometry(reference: Path) -> None:
    cases = json.loads((reference / "letterbox.json").read_text())["cases"]
    assert len(cases) == 120
    for case in cases:
        fit = letterbox_fit((case["h"], case["w"]), **MODES[case["mode"]])
        assert [fit.top, fit.bottom, fit.left, fit.right] == case["tblr"], case
        assert list(fit.ratio) == case["ratio"] and list(fit.pad) == case["pad"], case
        assert [fit.size[1] + fit.top + fit.bottom, fit.size[0] + fit.left + fit.right] == case["out"], case


def test_letterbox_image_has_grey_margins_and_says_how_to_go_back() -> None:
    image, box = letterbox(np.full((50, 100, 3), 200, np.uint8), 64, auto=False)
    assert image.shape == (64, 64, 3)
    assert (image[:16] == 114).all() and (image[48:] == 114).all() and (image[16:48] == 200).all()
    assert box.original == (50, 100) and box.ratio == (0.64, 0.64) and box.pad == (0, 16)


def test_letterboxed_pixels(arrays: dict, reference_set: Path) -> None:
    for name in ("im00.png", "im03.png", "im11.png"):
        image = cv2.imread(str(reference_set / name))
        ratio = 64 / max(image.shape[:2])
        size = [int(np.ceil(side * ratio)) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        image, _ = letterbox(image[..., ::-1], 64, auto=False, scaleup=False)
        expected = arrays[f"letterboxed64/{name}"].transpose(1, 2, 0)
        assert np.abs(image.astype(int) - expected).max() <= 2


def test_perspective_matrices_and_boxes(facts: dict) -> None:
    for case in facts["random_perspective"]:
        draw = Perspective(*case["draws_in_call_order"])
        in_hw, out_hw = tuple(case["in_shape"]), tuple(case["out_shape"][:2])
        matrix = draw.matrix(in_hw, out_hw)
        if case["M"] is not None:
            expected = np.array(case["M"])
            np.testing.assert_allclose(matrix[: len(expected)], expected, atol=1e-9)
        boxes = warp_labels(np.float32(case["boxes_in"]), None, draw, matrix, out_hw)
        np.testing.assert_allclose(boxes, case["boxes_out"], atol=1e-4, err_msg=case["name"])


def test_warped_boxes_surround_warped_pixels() -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    image[60:100, 80:150] = 255
    draw = Perspective(angle=25, scale=0.8, shear_x=6, shear_y=-3, translate_x=0.52, translate_y=0.47)
    matrix = draw.matrix((200, 200), (200, 200))
    ys, xs = np.nonzero(warp(image, matrix, (200, 200)).max(2) > 128 + 20)
    ((x1, y1, x2, y2),) = warp_boxes(np.array([[80.0, 60, 150, 100]]), matrix)
    np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [x1, y1, x2, y2], atol=2)


def test_a_polygon_gives_a_tighter_box_than_its_corners() -> None:
    labels = np.float32([[0, 40, 40, 120, 120]])
    triangle = [np.float32([(40, 40), (120, 40), (40, 120)])]
    draw = Perspective(angle=45)
    matrix = draw.matrix((160, 160), (160, 160))
    loose = warp_labels(labels, None, draw, matrix, (160, 160))[0, 1:]
    tight = warp_labels(labels, triangle, draw, matrix, (160, 160))[0, 1:]
    assert (tight[:2] >= loose[:2] - 1e-3).all() and (tight[2:] <= loose[2:] + 1e-3).all()
    assert np.prod(tight[2:] - tight[:2]) < 0.7 * np.prod(loose[2:] - loose[:2])


def test_plain_boxes_and_polygons_mix_row_by_row() -> None:
    labels = np.float32([[0, 10, 10, 50, 50], [1, 60, 60, 100, 100]])
    segments = [np.zeros((0, 2), np.float32), np.float32([(60, 60), (100, 60), (100, 100), (60, 100)])]
    draw = Perspective()
    out = warp_labels(labels, segments, draw, draw.matrix((128, 128), (128, 128)), (128, 128))
    np.testing.assert_allclose(out, labels, atol=1e-3)


def test_box_filter(facts: dict) -> None:
    case = facts["box_candidates"]
    before, after = np.array(case["box1"]).T, np.array(case["box2"]).T
    assert keep_boxes(before, after, 0.10).tolist() == case["keep_area_0_10"]
    assert keep_boxes(before, after, 0.01).tolist() == case["keep_area_0_01"]


def test_hsv(arrays: dict) -> None:
    factors = np.array([0.5, -0.4, 0.8]) * (0.015, 0.7, 0.4) + 1
    out = apply_hsv(arrays["hsv/in_bgr"][..., ::-1].copy(), factors)
    expected = arrays["hsv/out_r_0.5_-0.4_0.8_gains_.015_.7_.4"][..., ::-1]
    assert np.abs(out.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("factors", [(1.01, 1.3, 0.7), (0.985, 0.3, 1.4), (1.5, 1.7, 1.0), (1, 1, 0.6)])
def test_hsv_equals_its_tables(factors: tuple) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    hsv = cv2.merge([cv2.LUT(p, t) for p, t in zip(planes, hsv_tables(np.array(factors)))])
    out = apply_hsv(image, np.array(factors))
    assert np.abs(out.astype(int) - cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)).max() <= 1
    rgba = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    np.testing.assert_array_equal(apply_hsv(rgba, np.array(factors)), out)


def test_copy_paste(facts: dict, arrays: dict) -> None:
    case = facts["copy_paste"]
    segments = [np.float32(s) for s in case["segments_in"]]
    labels = np.float32(case["labels_in"])
    image = arrays["copy_paste/in"].copy()
    for seed in range(3):  # the order of the copies is drawn; here only one of the two finds room
        out, rows, grown = copy_paste(image, labels, segments, case["p"], np.random.default_rng(seed))
        np.testing.assert_allclose(rows, case["labels_out"], atol=1e-4)
        assert len(grown) == case["n_segments"]
        np.testing.assert_array_equal(out, arrays["copy_paste/out"])
    np.testing.assert_array_equal(image, arrays["copy_paste/in"])


def test_mixup_is_the_weighted_sum_cut_to_whole_numbers() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(2))
    rows = np.zeros((1, 5), np.float32), np.ones((2, 5), np.float32)
    image, labels = mixup((a, rows[0]), (b, rows[1]), 0.37)
    assert np.abs(image.astype(int) - (a * 0.37 + b * 0.63).astype(int)).max() <= 1
    assert labels[:, 0].tolist() == [0, 1, 1]


@pytest.mark.parametrize(("up", "left"), [(False, True), (True, False), (True, True), (False, False)])
def test_flips_move_labels_with_pixels(up: bool, left: bool) -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[2:6, 4:14] = 255
    labels = np.float32([[3, 9 / 40, 4 / 20, 10 / 40, 4 / 20]])
    out, (row,) = finish(image, np.ones(3), up, left), flip_labels(labels, up, left)
    ys, xs = np.nonzero(out[..., 0])
    corners = [(row[1] - row[3] / 2) * 40, (row[2] - row[4] / 2) * 20, (row[1] + row[3] / 2) * 40]
    np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1], corners, atol=1e-4)
    assert labels[0, 1] == np.float32(9 / 40)


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (1.01, 0.6, 1.3), (1.6, 1.2, 0.8)])
@pytest.mark.parametrize("channels", [3, 4])
def test_strips_make_the_whole_image_in_place(factors: tuple, channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (150, 900, channels), np.uint8)  # four strips
    whole = np.concatenate([apply_hsv(image[row : row + 1], np.array(factors)) for row in range(150)])
    for mirrored, code in {(False, False): None, (True, False): 0, (False, True): 1, (True, True): -1}.items():
        out = np.zeros((150, 900, 3), np.uint8)
        assert finish(image, np.array(factors), *mirrored, out) is out
        expected = whole if code is None else cv2.flip(whole, code)
        # OpenCV's vector and scalar code round a few pixels differently
        assert np.abs(out.astype(int) - expected).max() <= (0 if factors == (1.0, 1.0, 1.0) else 2)
        assert (out != expected).mean() < 0.01


def test_draws_stay_within_their_gains() -> None:
    draws = [draw_perspective(np.random.default_rng(s), 10, 0.2, 0.5, 3, 0.001) for s in range(300)]
    low, high = np.min(draws, 0), np.max(draws, 0)
    limits = np.array([0.001, 0.001, 10, 0.5, 3, 3, 0.2, 0.2])
    centre = np.array([0, 0, 0, 1, 0, 0, 0.5, 0.5])
    assert (low >= centre - limits).all() and (high <= centre + limits).all()
    assert (high - low > 1.6 * limits).all()
    hsv = np.array([draw_hsv(np.random.default_rng(s), (0.1, 0.5, 0)) for s in range(300)])
    assert (np.abs(hsv - 1) <= (0.1, 0.5, 0)).all()
