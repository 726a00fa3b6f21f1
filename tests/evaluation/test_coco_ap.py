"""COCO's numbers from arrays equal those of the library that follows pycocotools."""

from __future__ import annotations

import numpy as np
import pytest

from utils import coco
from utils.coco_ap import coco_stats

NC = 4


def made_up(seed: int, images: int = 12) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Detections (n, 6) about labels (m, 5) of all sizes, some images without one or the other, many equal scores."""
    rng = np.random.default_rng(seed)
    detections, labels = [], []
    for image in range(images):
        count = int(rng.integers(0, 30)) * (image % 5 > 0)
        centre, size = rng.uniform(50, 600, (count, 2)), np.exp(rng.uniform(2, 5.5, (count, 2)))
        classes = rng.integers(0, NC - 1, count)  # one class never comes
        corners = np.concatenate((centre - size / 2, centre + size / 2), 1)
        labels.append(np.concatenate((classes[:, None], corners), 1))
        copies = int(rng.integers(0, 12)) * (image % 7 > 0)
        shifted = np.repeat(corners, copies, 0) + rng.normal(0, 4, (count * copies, 4))
        shifted[:, 2:] = np.maximum(shifted[:, 2:], shifted[:, :2] + 1)
        score, cls = rng.integers(1, 60, len(shifted)) / 60, np.repeat(classes, copies)
        cls = np.where(rng.random(len(cls)) < 0.1, rng.integers(0, NC, len(cls)), cls)
        rows = np.concatenate((shifted, score[:, None], cls[:, None]), 1).astype(np.float32)
        detections.append(rows[np.argsort(-rows[:, 4], kind="stable")])
    return detections, labels


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_library(seed: int) -> None:
    detections, labels = made_up(seed)
    ids = list(range(len(labels)))
    names = {number: str(number) for number in range(NC)}
    truth = coco.ground_truth(ids, [(640, 640)] * len(ids), labels, names, range(NC))
    entries = [e for i, rows in zip(ids, detections) for e in coco.detections_to_coco(i, rows, range(NC))]
    expected = coco.evaluate_coco(truth, entries)
    assert coco_stats(detections, labels, NC) == pytest.approx([expected[name] for name in coco.STATS], abs=1e-9)


def test_no_images_no_labels_no_detections() -> None:
    none, labels = np.zeros((0, 6)), np.array([[1, 0, 0, 10, 10.0]])
    assert coco_stats([], [], 2) == [-1.0] * 12
    assert coco_stats([none], [np.zeros((0, 5))], 2) == [-1.0] * 12
    assert coco_stats([none], [labels], 2) == [0, 0, 0, 0, -1, -1, 0, 0, 0, 0, -1, -1]
    assert coco_stats([np.array([[0, 0, 10, 10, 0.9, 1.0]])], [labels], 2)[:3] == pytest.approx([1, 1, 1])
