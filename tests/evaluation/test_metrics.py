"""AP, matching and the confusion matrix against upstream's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation import bccd
from utils import matching
from utils.boxes import box_iou, scale_to_original
from utils.confusion import ConfusionMatrix
from utils.matching import match_predictions
from utils.metrics import (
    TABLE_HEADER,
    Metrics,
    ap_per_class,
    average_precision,
    iou_thresholds,
    smooth,
)

REFERENCE = Path(__file__).parents[1] / "reference"
CASES = json.loads((REFERENCE / "ap.json").read_text())
ARRAYS = dict(np.load(REFERENCE / "ap.npz"))
AP_CASES = [name for name in CASES if f"{name}/tp" in ARRAYS]


def compute(name):
    return ap_per_class(*(ARRAYS[f"{name}/{key}"] for key in ("tp", "conf", "pred_cls", "target_cls")))


@pytest.mark.parametrize("name", AP_CASES)
def test_ap_per_class_equals_reference(name):
    result = compute(name)
    for key in ("tp", "fp", "p", "r", "f1", "ap"):
        np.testing.assert_allclose(getattr(result, key), ARRAYS[f"{name}/out_{key}"], rtol=0, atol=1e-9)
    assert result.classes.tolist() == ARRAYS[f"{name}/out_cls"].tolist()


@pytest.mark.parametrize("name", AP_CASES)
def test_means_and_fitness_equal_reference(name):
    metrics, expected = Metrics(compute(name), images=1), CASES[name]
    got = {"P": metrics.p, "R": metrics.r, "mAP50": metrics.map50, "mAP": metrics.map, "fitness": metrics.fitness}
    assert got == pytest.approx(expected, abs=1e-9)


def test_average_precision_and_smoothing_examples():
    case = CASES["compute_ap_example"]
    assert average_precision(np.array(case["recall"]), np.array(case["precision"]))[0] == pytest.approx(
        case["ap"], 1e-9
    )
    case = CASES["smooth_example"]
    np.testing.assert_allclose(smooth(np.array(case["y"], float), case["f"]), case["out"], atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(270, 13), (1, 1), (0, 5), (4, 0)])
def test_boxes_as_arrays_and_as_tensors_agree_to_the_last_bit(n, m):
    """Also those without an area, and those that lie outside the image they are brought back to."""
    random = np.random.default_rng(n)
    a, b = (600 * random.random((count, 4), np.float32) for count in (n, m))
    a[: n // 2, 2:] += a[: n // 2, :2]
    b[:, 2:] = b[:, :2] + 50
    b[:1] = a[:1] if m and n else b[:1]
    as_arrays, as_tensors = box_iou(a, b), box_iou(torch.from_numpy(a), torch.from_numpy(b))
    assert as_arrays.dtype == np.float32
    np.testing.assert_array_equal(as_arrays, as_tensors.numpy())
    place = ((512, 672), (480, 640), 1.05, (3.5, 4))
    back = scale_to_original(a, *place)
    np.testing.assert_array_equal(back, scale_to_original(torch.from_numpy(a), *place).numpy())
    assert back.dtype == np.float32 and (n == 0 or back.max() <= 640)


def test_matching_equals_reference():
    correct = match_predictions([ARRAYS["match/det"]], [ARRAYS["match/labels"]], iou_thresholds())
    np.testing.assert_array_equal(correct, ARRAYS["match/correct"])


def test_confusion_equals_reference():
    matrix = ConfusionMatrix(3)
    matrix.update([ARRAYS["match/det"]], [ARRAYS["match/labels"]])
    np.testing.assert_array_equal(matrix.matrix, ARRAYS["match/confusion"])


def test_confusion_of_images_without_labels_or_detections():
    matrix = ConfusionMatrix(2)
    detection, label = np.array([[0, 0, 9, 9, 0.9, 1]]), np.array([[0, 20, 20, 30, 30]])
    matrix.update([detection], [np.zeros((0, 5))])
    assert matrix.matrix.sum() == 0
    matrix.update([np.zeros((0, 6))], [label])  # missed
    matrix.update([detection], [label])  # missed; the lone false alarm is not counted (no pair in this image)
    assert matrix.matrix.tolist() == [[0, 0, 0], [0, 0, 0], [2, 0, 0]]


def test_the_most_confident_detection_wins_its_label():
    label = np.array([[0, 0, 0, 10, 10]])
    detections = np.array([[0, 0, 10, 7, 0.9, 0], [0, 0, 10, 10, 0.8, 0], [0, 0, 10, 10, 0.7, 1]])
    correct = match_predictions([detections], [label], iou_thresholds())
    assert correct[:, 0].tolist() == [True, False, False]  # IoU 0.7 reaches 0.5 first
    assert correct[:, -1].tolist() == [False, True, False]  # only the second reaches 0.95; another class never


def test_matching_without_labels_or_detections():
    assert match_predictions([np.zeros((0, 6))], [np.ones((2, 5))], iou_thresholds()).shape == (0, 10)
    assert not match_predictions([np.ones((2, 6))], [np.zeros((0, 5))], iou_thresholds()).any()


def test_matching_against_loops():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (7, 2))
    labels = np.column_stack((rng.integers(0, 2, 7), corner, corner + rng.uniform(20, 40, (7, 2))))
    near = labels[rng.integers(0, 7, 28)]  # several detections for some labels, none for others
    boxes = near[:, 1:] + rng.normal(0, 3, (28, 4))
    detections = np.column_stack((boxes, np.sort(rng.uniform(size=28))[::-1], near[:, 0]))
    thresholds = iou_thresholds()
    expected = np.zeros((28, 10), bool)
    for column, threshold in enumerate(thresholds):
        taken = set()
        for d, detection in enumerate(detections):
            ious = [overlap(detection[:4], lab[1:]) if lab[0] == detection[5] else -1 for lab in labels]
            best = int(np.argmax(ious))
            if ious[best] >= threshold and best not in taken:
                taken.add(best)
                expected[d, column] = True
    np.testing.assert_array_equal(match_predictions([detections], [labels], thresholds), expected)
    assert 0 < expected[:, 6].sum() < expected[:, 0].sum()


@pytest.mark.parametrize("most", [1, 150, 1 << 20])
def test_a_batch_is_matched_as_its_images_one_by_one(most, monkeypatch):
    """To the last bit, images without labels and without detections among them, whatever is compared at once."""
    monkeypatch.setattr(matching, "MOST_PAIRS", most)
    rng = np.random.default_rng(5)
    pairs, offset = [], 0
    ious, places, alone = [], [], ConfusionMatrix(3)
    for n, m in ((0, 3), (60, 7), (9, 0), (1, 1), (0, 0), (40, 12)):
        corners = rng.uniform(0, 60, (m, 2)).astype(np.float32)
        labels = np.column_stack((rng.integers(0, 3, m), corners, corners + rng.uniform(10, 40, (m, 2)))).astype("f4")
        boxes = labels[rng.integers(0, m, n), 1:] + rng.normal(0, 4, (n, 4)) if m else rng.uniform(0, 9, (n, 4))
        scores = np.sort(rng.uniform(size=n))[::-1]
        detections = np.column_stack((boxes, scores, rng.integers(0, 3, n))).astype("f4")
        pairs.append((detections, labels))
        iou = box_iou(detections[:, :4], labels[:, 1:5])
        iou[detections[:, 5:] != labels[None, :, 0]] = -1
        ious.append(iou.max(1, initial=-1))
        places.append(iou.argmax(1) + offset if m else np.zeros(n, int))
        offset += m
        alone.update([detections], [labels])
    found, given = zip(*pairs)
    best, place = matching.best_labels(found, given)
    np.testing.assert_array_equal(best, np.concatenate(ious))
    np.testing.assert_array_equal(place, np.concatenate(places))
    apart = [match_predictions([detections], [labels], iou_thresholds()) for detections, labels in pairs]
    np.testing.assert_array_equal(match_predictions(found, given, iou_thresholds()), np.concatenate(apart))
    together = ConfusionMatrix(3)
    together.update(found, given)
    np.testing.assert_array_equal(together.matrix, alone.matrix)
    assert together.matrix.sum() > 20 and np.concatenate(apart).any()


def overlap(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / (area + 1e-7)


def test_perfect_detector_gets_0995():
    metrics = Metrics(ap_per_class(np.ones((5, 10), bool), np.full(5, 0.9), np.zeros(5), np.zeros(5)), images=5)
    assert (metrics.map50, metrics.map) == pytest.approx((0.995, 0.995))


def test_nothing_at_all_is_zero():
    metrics = Metrics(ap_per_class(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.zeros(0)), images=3)
    assert metrics.row() == [0.0] * 7 and metrics.labels == 0
    assert metrics.maps(2).tolist() == [0, 0]


def test_maps_fill_missing_classes_with_the_mean():
    metrics = Metrics(compute("class_without_preds"), images=1)
    maps = metrics.maps(7)
    assert maps[metrics.classes] == pytest.approx(metrics.ap.mean(1))
    assert maps[5] == pytest.approx(metrics.map)


def test_table_has_the_familiar_columns():
    metrics = Metrics(compute("four_classes"), images=12)
    assert TABLE_HEADER.split() == ["Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95"]
    lines = metrics.table({i: f"c{i}" for i in range(4)}).split("\n")
    assert lines[0].split() == ["all", "12", "80", "0.699", "0.924", "0.86", "0.429"]
    assert [line.split()[0] for line in lines[1:]] == ["c0", "c1", "c2", "c3"]
    assert all(len(line) == len(TABLE_HEADER) for line in lines)
    assert len(metrics.table({0: "a", 1: "b"}, verbose=False).split("\n")) == 1


def test_stored_bccd_detections_give_upstreams_metrics():
    pairs = bccd.load()
    tp = match_predictions(*zip(*pairs), iou_thresholds())
    detections, labels = (np.concatenate(parts) for parts in zip(*pairs))
    metrics = Metrics(ap_per_class(tp, detections[:, 4], detections[:, 5], labels[:, 0]), images=len(pairs))
    assert len(detections) == 26100 and metrics.labels == 1137
    expected = [0.80153, 0.86784, 0.88026, 0.52134]
    assert [metrics.p, metrics.r, metrics.map50, metrics.map] == pytest.approx(expected, abs=1e-4)
    per_class = metrics.per_class
    assert per_class.p == pytest.approx([0.73116, 0.93247, 0.74096], abs=2e-4)
    assert per_class.r == pytest.approx([0.79628, 1.0, 0.80723], abs=1e-4)
    assert per_class.ap.mean(1) == pytest.approx([0.52617, 0.65960, 0.37823], abs=2e-4)
    assert per_class.ap[:, 5] == pytest.approx([0.62130, 0.83159, 0.23658], abs=1e-3)
