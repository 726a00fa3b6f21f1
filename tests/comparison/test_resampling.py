"""AP of resampled images against the plain way: repeat the images and evaluate them."""

from __future__ import annotations

import numpy as np
import pytest

from comparison.groups import COCO_AREAS, Bins, ratio_bins, size_bins
from comparison.matching import Predictions, everything, in_bin, match
from comparison.resampling import average_precisions, draw_weights, mean_ap
from utils.matching import match_predictions
from utils.metrics import ap_per_class, iou_thresholds

NC = 3


def made_up(images: int = 12, seed: int = 0, ties: bool = False) -> Predictions:
    """Boxes near labels, beside them, and of the wrong class; one image without labels, one without detections."""
    rng = np.random.default_rng(seed)
    detections, labels = [], []
    for image in range(images):
        count = 0 if image == 1 else int(rng.integers(1, 6))
        start = rng.uniform(0, 300, (count, 2))
        boxes = np.concatenate((start, start + rng.uniform(8, 150, (count, 2))), 1)
        cls = rng.integers(0, NC - 1, count)  # the last class has no labels anywhere
        labels.append(np.column_stack((cls, boxes)))
        near = np.repeat(boxes, 3, 0) + rng.normal(0, 6, (3 * count, 4))
        start = rng.uniform(0, 300, (4, 2))
        away = np.concatenate((start, start + rng.uniform(8, 150, (4, 2))), 1)
        all_boxes = np.concatenate((near, away)) if image != 2 else np.zeros((0, 4))
        guess = np.concatenate((np.repeat(cls, 3), rng.integers(0, NC, 4)))[: len(all_boxes)]
        conf = rng.permutation(1000)[: len(all_boxes)] / 1000 + image / 1e5  # no two alike
        rows = np.column_stack((all_boxes, conf.round(1) if ties else conf, guess))
        detections.append(rows[np.argsort(-rows[:, 4], kind="stable")])
    offsets = [np.concatenate(([0], np.cumsum([len(rows) for rows in part]))) for part in (detections, labels)]
    paths = tuple(f"{i}.jpg" for i in range(images))
    flat = [np.concatenate(part).astype(np.float32) for part in (detections, labels)]
    return Predictions(paths, flat[0], offsets[0], flat[1], offsets[1])


def plain(found: Predictions, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes and (c, 10) AP by ap_per_class, image i taken times[i] times."""
    correct, detections, targets = [], [np.zeros((0, 6))], [np.zeros(0)]
    for image, count in enumerate(times):
        rows, labels = found.of_image(image)
        for _ in range(int(count)):
            correct.append(match_predictions([rows], [labels], iou_thresholds()))
            detections.append(rows)
            targets.append(labels[:, 0])
    rows = np.concatenate(detections)
    result = ap_per_class(np.concatenate(correct), rows[:, 4], rows[:, 5], np.concatenate(targets))
    return result.classes, result.ap


@pytest.mark.parametrize("ties", [False, True])
def test_weight_one_is_val_pys_average_precision(ties: bool) -> None:
    found = made_up(ties=ties)
    matched = match(found)
    ap = average_precisions(matched, everything(matched), np.ones((1, 12), np.float32), NC)
    classes, expected = plain(found, np.ones(12))
    np.testing.assert_allclose(ap[classes, :, 0], expected, atol=1e-12)
    assert np.isnan(ap[2]).all()  # no labels
    assert mean_ap(ap)[0] == pytest.approx(expected.mean(), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_resampling_equals_repeating_the_images(seed: int) -> None:
    found = made_up(seed=seed)
    weights = draw_weights(12, 30, seed)
    assert (weights.sum(1) == 12).all() and (weights == draw_weights(12, 30, seed)).all()
    matched = match(found)
    ap = average_precisions(matched, everything(matched), weights, NC)
    for column in range(30):
        classes, expected = plain(found, weights[column])
        np.testing.assert_allclose(ap[classes, :, column], expected, atol=1e-12)
        assert np.isnan(np.delete(ap[:, :, column], classes, 0)).all()


def test_chunks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matched, weights = match(made_up()), draw_weights(12, 20)
    whole = average_precisions(matched, everything(matched), weights, NC)
    monkeypatch.setattr("comparison.resampling._CHUNK", 300)
    np.testing.assert_array_equal(average_precisions(matched, everything(matched), weights, NC), whole)


def test_a_bin_counts_its_own_boxes_only() -> None:
    """Small: found. Large: missed, with a false large box beside it. Each bin's AP tells just that."""
    labels = np.array([[0, 0, 0, 10, 10], [0, 100, 100, 300, 300]], np.float32)
    detections = np.array([[100, 400, 300, 600, 0.9, 0], [0, 0, 10, 10, 0.8, 0]], np.float32)
    found = Predictions(("a.jpg",), detections, np.array([0, 2]), labels, np.array([0, 2]))
    matched, one = match(found), np.ones((1, 1), np.float32)
    bins = Bins("size", ("small", "medium", "large"), COCO_AREAS, "")
    aps = [mean_ap(average_precisions(matched, in_bin(matched, bins, k), one, 1))[0] for k in range(3)]
    assert aps[0] == pytest.approx(0.995) and np.isnan(aps[1]) and aps[2] == 0


def test_a_detection_of_another_bins_label_is_neither_right_nor_wrong() -> None:
    """A label of 31 x 31 found by a box of 33 x 33: a hit for small, nothing at all for medium."""
    labels = np.array([[0, 0, 0, 31, 31], [0, 100, 100, 150, 150]], np.float32)
    detections = np.array([[0, 0, 33, 33, 0.9, 0], [100, 100, 150, 150, 0.8, 0]], np.float32)
    found = Predictions(("a.jpg",), detections, np.array([0, 2]), labels, np.array([0, 2]))
    matched, one = match(found), np.ones((1, 1), np.float32)
    bins = Bins("size", ("small", "medium", "large"), COCO_AREAS, "")
    small, medium = (average_precisions(matched, in_bin(matched, bins, k), one, 1)[0, 0, 0] for k in (0, 1))
    assert small == pytest.approx(0.995) and medium == pytest.approx(0.995)


def test_bins_are_coco_s_where_they_say_something_and_thirds_elsewhere() -> None:
    sides = np.array([10, 20, 40, 60, 100, 200], np.float64)
    boxes = np.column_stack((np.zeros((6, 2)), sides, sides))
    assert size_bins(boxes).names == ("small", "medium", "large")
    assert size_bins(boxes).index(boxes).tolist() == [0, 0, 1, 1, 2, 2]
    many = np.column_stack((np.zeros((9, 2)), np.arange(40, 85, 5), np.arange(40, 85, 5)))
    thirds = size_bins(many)
    assert "third" in thirds.names[0] and "thirds" in thirds.note
    assert np.bincount(thirds.index(many)).tolist() == [3, 3, 3]
    assert size_bins(np.zeros((0, 4))).names == ("small", "medium", "large")


def test_ratio_takes_the_longer_side_first() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 20, 10], [0, 0, 100, 10], [5, 5, 5, 9]])
    assert ratio_bins().index(boxes).tolist() == [0, 1, 1, 2, 2]
