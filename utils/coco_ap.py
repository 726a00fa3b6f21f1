"""COCO's twelve numbers from arrays: what pycocotools computes for boxes without crowds, without a dictionary for each
detection, of which a split of 1,640 images has some 400,000.

Matching is greedy: in each image and class, by falling confidence, a detection takes the free label it overlaps most.
Done here for all images and classes side by side, the best detection of each first, then the second, ..., for all ten
IoU thresholds and four ranges of area together; only detections that overlap a label by half take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = np.array([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)])  # all, small, medium, large
MOST = (1, 10, 100)
"""Detections of a class in an image that count."""


@dataclass(frozen=True)
class _Boxes:
    """Sorted by ``group``, which is an image and a class; ``box`` (n, 4) x, y, width, height; detections by falling
    confidence within, of which ``rank`` is the place."""

    group: np.ndarray
    box: np.ndarray
    score: np.ndarray
    rank: np.ndarray

    @property
    def area(self) -> np.ndarray:
        return self.box[:, 2] * self.box[:, 3]

    def beyond(self) -> np.ndarray:
        """(4, n) whether the area is outside each range."""
        return (self.area < AREAS[:, :1]) | (self.area > AREAS[:, 1:])


def coco_stats(detections: Sequence[np.ndarray], labels: Sequence[np.ndarray], nc: int) -> list[float]:
    """AP, AP50, AP75, AP of small, medium, large; AR of 1, 10, 100 detections, of small, medium, large; -1 where there
    are no such labels.

    Of each image ``detections`` (n, 6) x1, y1, x2, y2 in pixels, confidence, class, and ``labels`` (m, 5) class, x1,
    y1, x2, y2. Boxes and confidences are rounded as in a result file (utils.coco.detections_to_coco).
    """
    found = _boxes([d[:, 5] for d in detections], [d[:, :4] for d in detections], [d[:, 4] for d in detections], nc)
    truth = _boxes([t[:, 0] for t in labels], [t[:, 1:] for t in labels], None, nc)
    matched, ignored = _match(found, truth)
    ignored |= ~matched & found.beyond()[None]
    counted = ~truth.beyond()
    order = np.argsort(-found.score, kind="stable")  # images come in their order
    precision = np.full((len(THRESHOLDS), len(RECALLS), nc, len(AREAS)), -1.0)
    recall = np.full((len(THRESHOLDS), nc, len(AREAS), len(MOST)), -1.0)
    for cls in range(nc):
        own = order[found.group[order] % nc == cls]
        totals = counted[:, truth.group % nc == cls].sum(1)
        for area in np.flatnonzero(totals):
            hits, left_out = matched[:, area, own], ignored[:, area, own]
            hits &= ~left_out
            for index, most in enumerate(MOST):
                recall[:, cls, area, index] = hits[:, found.rank[own] < most].sum(1) / totals[area]
            precision[:, :, cls, area] = _curve(hits, ~hits & ~left_out, totals[area])
    return _summary(precision, recall)


def _boxes(
    classes: Sequence[np.ndarray], corners: Sequence[np.ndarray], scores: Sequence[np.ndarray] | None, nc: int
) -> _Boxes:
    """Sorted; of detections, which have ``scores``, the best MOST[-1] of each image and class."""
    images = np.repeat(np.arange(len(classes)), [len(c) for c in classes])
    none = np.zeros((0, 4))
    box = np.concatenate([none, *corners]).astype(np.float64)
    box[:, 2:] -= box[:, :2]
    cls = np.concatenate([np.zeros(0), *classes]).astype(int)
    score = np.zeros(len(box))
    if scores is not None:
        score = np.concatenate([np.zeros(0), *scores]).astype(np.float64).round(5)
        box = box.round(3)
    group = images * nc + cls
    order = np.lexsort((-score, group))
    group = group[order]
    starts = np.searchsorted(group, group)
    rank = np.arange(len(group)) - starts
    kept = rank < MOST[-1] if scores is not None else slice(None)
    return _Boxes(group[kept], box[order][kept], score[order][kept], rank[kept])


def _match(found: _Boxes, truth: _Boxes) -> tuple[np.ndarray, np.ndarray]:
    """(10, 4, detections): whether a detection has a label, and whether that label is outside the range of area."""
    shape = (len(THRESHOLDS), len(AREAS))
    matched, ignored = (np.zeros((*shape, len(found.group)), bool) for _ in range(2))
    free, beyond = np.ones((*shape, len(truth.group)), bool), truth.beyond()
    detection, label, overlap = _overlapping(found, truth)
    rank = found.rank[detection]
    order = np.argsort(rank, kind="stable")  # a detection's rows stay together
    ends = np.searchsorted(rank[order], np.arange(MOST[-1] + 1))
    for start, end in zip(ends[:-1], ends[1:]):
        if start == end:
            continue
        rows = order[start:end]
        gt, iou = label[rows], overlap[rows]
        # labels within the range come first, whatever they overlap
        value = np.where(beyond[:, gt], iou, iou + 2)[None] * (free[:, :, gt] & (iou >= THRESHOLDS[:, None])[:, None])
        starts = np.flatnonzero(np.diff(detection[rows], prepend=-1))
        best = np.maximum.reduceat(value, starts, axis=2)
        counts = np.diff(starts, append=len(rows))
        taken = (value == np.repeat(best, counts, axis=2)) * np.arange(1, len(rows) + 1)  # of equals the last
        last = np.maximum.reduceat(taken, starts, axis=2) - 1
        level, area, which = np.nonzero(best > 0)
        won = gt[last[level, area, which]]
        free[level, area, won] = False
        here = detection[rows][starts][which]
        matched[level, area, here] = True
        ignored[level, area, here] = beyond[area, won]
    return matched, ignored


def _overlapping(found: _Boxes, truth: _Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detection, label and IoU of all pairs of one image and class with an IoU of the least threshold or more; by
    detection, then label."""
    first = np.searchsorted(truth.group, found.group)
    counts = np.searchsorted(truth.group, found.group, "right") - first
    detection = np.repeat(np.arange(len(counts)), counts)
    label = np.arange(len(detection)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    a, b = found.box[detection], truth.box[label]
    sides = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    inter = sides.clip(min=0).prod(1)
    union = found.area[detection] + truth.area[label] - inter
    overlap = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    near = overlap >= THRESHOLDS[0]
    return detection[near], label[near], overlap[near]


def _curve(hits: np.ndarray, misses: np.ndarray, total: int) -> np.ndarray:
    """Precision (10, 101) at RECALLS, of detections (10, n) by falling confidence. It falls between hits only, so that
    looking at hits is enough."""
    curve = np.zeros((len(hits), len(RECALLS)))
    for row, (hit, miss) in enumerate(zip(hits, misses)):
        at = np.flatnonzero(hit)
        count = np.arange(1, len(at) + 1)
        precision = count / (count + miss.cumsum()[at] + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(count / total, RECALLS)
        curve[row, reached < len(at)] = precision[reached[reached < len(at)]]
    return curve


def _summary(precision: np.ndarray, recall: np.ndarray) -> list[float]:
    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    everything = [precision[..., 0], precision[0, :, :, 0], precision[5, :, :, 0]]
    sizes = [precision[..., area] for area in (1, 2, 3)]
    recalls = [recall[:, :, 0, 0], recall[:, :, 0, 1], recall[:, :, 0, 2], *(recall[:, :, a, 2] for a in (1, 2, 3))]
    return [mean(values) for values in (*everything, *sizes, *recalls)]
