"""Average precision of resampled images: the bootstrap over images, without touching a picture twice.

A resample that draws image i w_i times is the same as giving image i the weight w_i. AP for whole-number weights is
computed for many resamples at once, and is exactly what utils.metrics.ap_per_class gives for the repeated images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from comparison.matching import Matched, Scope

RECALLS = np.linspace(0, 1, 101)
_CHUNK = 4_000_000
"""Values of one intermediate array, so that memory stays below some 200 MB."""


def draw_weights(images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """(resamples, images) float32: how often each image is drawn, with replacement, in each resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float32)


def average_precisions(matched: Matched, scope: Scope, weights: np.ndarray, nc: int) -> np.ndarray:
    """AP (nc, t, B) float64 of each class at each IoU threshold for each row of ``weights`` (B, I); NaN for a class
    that has no labels in that resample (or in the scope at all)."""
    thresholds, resamples = matched.hit.shape[1], len(weights)
    ap = np.full((nc, thresholds, resamples), np.nan)
    for cls in range(nc):
        images = matched.label_image[scope.labels & (matched.label_cls == cls)]
        if not len(images):
            continue
        labels = weights.astype(np.float64) @ np.bincount(images, minlength=matched.images)
        rows = np.flatnonzero(matched.cls == cls)
        for column in range(thresholds):
            seen = rows[scope.counted[rows, column]]
            curve = _Curve(matched.image[seen], scope.hit[seen, column], matched.images)
            ap[cls, column] = curve.areas(weights, labels)
    return ap


def mean_ap(ap: np.ndarray) -> np.ndarray:
    """(B,) mean over the classes that have labels, and thresholds, of (nc, t, B); NaN where no class has any."""
    with np.errstate(invalid="ignore"):
        return np.nansum(ap, (0, 1)) / (~np.isnan(ap)).sum((0, 1))


class _Curve:
    """Detections of one class by falling confidence, reduced to their hits and the false ones before each hit."""

    def __init__(self, image: np.ndarray, hit: np.ndarray, images: int) -> None:
        self.hit_image = image[hit]
        count, false = len(self.hit_image), ~hit
        self.segment = np.cumsum(hit)[false]  # which hit a false one comes before, rising; ``count`` for the last ones
        self.false_image, self.segments, self.images = image[false], count + 1, images

    def false_before(self, weights: np.ndarray) -> np.ndarray:
        """(B, k + 1) weighted numbers of false detections before each of the k hits, and after the last; of some hits
        at a time, as images times hits would be gigabytes for a large set."""
        width = max(1, _CHUNK // self.images)
        parts = []
        for start in range(0, self.segments, width):
            count = min(width, self.segments - start)
            here = slice(*np.searchsorted(self.segment, (start, start + count)))
            places = self.false_image[here] * count + (self.segment[here] - start)
            cells = np.bincount(places, minlength=self.images * count).reshape(self.images, count)
            parts.append(weights @ cells.astype(np.float32))
        return np.concatenate(parts, 1)

    def areas(self, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """AP (B,) for ``weights`` (B, I) and the weighted number of ``labels`` (B,); NaN without labels."""
        if not len(self.hit_image):
            return np.where(labels > 0, 0.0, np.nan)
        parts = _parts(len(weights), max(len(self.hit_image), len(RECALLS)))
        return np.concatenate([self._areas(weights[part], labels[part]) for part in parts])

    def _areas(self, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """One part of the resamples. k hits, B resamples; everything in float64 once counted."""
        false = np.cumsum(self.false_before(weights), 1, dtype=np.float64)  # (B, k + 1), before each hit, and in all
        hits = np.cumsum(weights[:, self.hit_image], 1, dtype=np.float64)  # (B, k)
        last = hits[:, -1] / np.maximum(hits[:, -1] + false[:, -1], 1)  # precision when all detections are in
        envelope = hits / np.maximum(hits + false[:, :-1], 1)
        np.maximum.accumulate(envelope[:, ::-1], 1, out=envelope[:, ::-1])
        safe = np.maximum(labels, 1)[:, None]
        values = _sample(hits / safe, envelope, false, last[:, None], safe)
        area = (values.sum(1) - (values[:, 0] + values[:, -1]) / 2) / 100
        return np.where(labels > 0, area, np.nan)


def _parts(count: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // width)
    return (slice(start, start + step) for start in range(0, count, step))


def _sample(
    recall: np.ndarray, envelope: np.ndarray, false: np.ndarray, last: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Precision (B, 101) at RECALLS on the curve through (0, 1), every detection, and (1, 0), between which it is
    straight.

    Between two hits with false detections between them the curve falls at once to the level of the second one.
    Without any it is straight over one label's width: of a hit that counts several times, the first of them.
    """
    count = recall.shape[1]
    passed = np.stack([np.searchsorted(row, RECALLS, side="right") for row in recall])  # hits up to each recall
    right, left = np.minimum(passed, count - 1), np.maximum(passed - 1, 0)
    began = passed > 0
    left_recall = np.where(began, np.take_along_axis(recall, left, 1), 0.0)
    left_value = np.where(began, np.take_along_axis(envelope, left, 1), 1.0)
    left_false = np.where(began, np.take_along_axis(false, left, 1), 0.0)
    right_value = np.take_along_axis(envelope, right, 1)
    along = np.minimum((RECALLS - left_recall) * labels, 1)
    along[np.take_along_axis(false, right, 1) != left_false] = 1
    between = left_value + (right_value - left_value) * along
    after = last * (1 - RECALLS) / np.maximum(1 - recall[:, -1:], 1e-12)
    return np.where(passed < count, between, after)
