"""All detections of one model on one split, matched with the labels once, as flat arrays that can be resampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from comparison.groups import Bins
from utils.matching import best_labels, match_predictions
from utils.metrics import iou_thresholds


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model finds on a split, beside the labels. Boxes in pixels of the original images.

    ``paths``: file of each of I images; ``detections`` (n, 6) float32 x1, y1, x2, y2, confidence, class, image i's in
    rows ``detection_offsets``[i]:[i + 1], by falling confidence; ``labels`` (m, 5) float32 class, x1, y1, x2, y2 with
    ``label_offsets`` likewise.
    """

    paths: tuple[str, ...]
    detections: np.ndarray
    detection_offsets: np.ndarray
    labels: np.ndarray
    label_offsets: np.ndarray

    def of_image(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Detections (n, 6) and labels (m, 5) of one image."""
        d, m = self.detection_offsets, self.label_offsets
        return self.detections[d[index] : d[index + 1]], self.labels[m[index] : m[index + 1]]


@dataclass(frozen=True, eq=False)
class Matched:
    """Detections by falling confidence, of all images; t = 10 IoU thresholds.

    ``image`` (n,), ``cls`` (n,) whole numbers; ``hit`` (n, t): true positives, as val.py counts them; ``label`` (n,)
    row of the label that each overlaps most, -1 without one; ``reach`` (n, t): it overlaps that label by the threshold
    (so that it is a hit or a repeated one). ``boxes`` (n, 4). Of the labels: ``label_image`` (m,), ``label_cls`` (m,),
    ``label_boxes`` (m, 4). ``images``: how many there are.
    """

    images: int
    image: np.ndarray
    cls: np.ndarray
    boxes: np.ndarray
    hit: np.ndarray
    label: np.ndarray
    reach: np.ndarray
    label_image: np.ndarray
    label_cls: np.ndarray
    label_boxes: np.ndarray


def match(found: Predictions) -> Matched:
    """Match each image's detections with its labels."""
    thresholds = iou_thresholds()
    detections, labels = zip(*map(found.of_image, range(len(found.paths)))) if found.paths else ((), ())
    some = [slice(first, first + 32) for first in range(0, len(found.paths), 32)]  # a batch stays in the caches
    hits = [match_predictions(detections[part], labels[part], thresholds) for part in some]
    hit = np.concatenate([np.zeros((0, len(thresholds)), bool), *hits])
    iou, label = best_labels(detections, labels)
    label[iou < 0] = -1
    order = np.argsort(-found.detections[:, 4], kind="stable")
    numbers = np.arange(len(found.paths))
    return Matched(
        images=len(found.paths),
        image=np.repeat(numbers, np.diff(found.detection_offsets))[order],
        cls=found.detections[order, 5].astype(int),
        boxes=found.detections[order, :4],
        hit=hit[order],
        label=label[order],
        reach=(iou[:, None] >= thresholds)[order],
        label_image=np.repeat(numbers, np.diff(found.label_offsets)),
        label_cls=found.labels[:, 0].astype(int),
        label_boxes=found.labels[:, 1:5],
    )


@dataclass(frozen=True, eq=False)
class Scope:
    """Which labels and detections count. ``labels`` (m,) bool; ``hit`` (n, t) and ``counted`` (n, t) bool: true
    positives, and all detections that count."""

    labels: np.ndarray
    hit: np.ndarray
    counted: np.ndarray


def everything(matched: Matched) -> Scope:
    """All of them."""
    return Scope(np.ones(len(matched.label_cls), bool), matched.hit, np.ones(matched.hit.shape, bool))


def in_bin(matched: Matched, bins: Bins, number: int) -> Scope:
    """Labels of one bin, by COCO's rule for sizes: what finds a label of another bin is left out, neither right nor
    wrong, and so is what finds none and would itself be in another bin."""
    labels = bins.index(matched.label_boxes) == number
    own = bins.index(matched.boxes) == number
    of_label = labels[matched.label] & (matched.label >= 0) if len(labels) else np.zeros(len(own), bool)
    counted = np.where(matched.reach, of_label[:, None], own[:, None])
    return Scope(labels, matched.hit & of_label[:, None], counted)
