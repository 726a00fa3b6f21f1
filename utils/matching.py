"""Which detection belongs to which label, for all images of a batch at once: in numpy, image by image, the calls cost
more than the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from utils.boxes import paired_iou

MOST_PAIRS = 1 << 14
"""Pairs of a detection and a label compared at once: what is made of them stays in the caches."""


def match_predictions(
    detections: Sequence[np.ndarray], labels: Sequence[np.ndarray], thresholds: np.ndarray
) -> np.ndarray:
    """Which detections are true positives, at each IoU threshold.

    ``detections``: of each image (n, 6), x1, y1, x2, y2, confidence, class, by falling confidence. ``labels``: of each
    (m, 5), class, x1, y1, x2, y2 in the same pixels. ``thresholds`` (t,) above 0. Arrays or CPU tensors. Returns
    (N, t) bool for the detections of all images, one after another.

    A detection belongs to the label of its class that it overlaps most. Of the detections that belong to a label and
    reach the threshold, the most confident one is the true positive, not the one that fits best. (COCO's rule
    differs: there each detection, by confidence, takes the best label that is still free.)
    """
    best_iou, best_label = best_labels(detections, labels)
    thresholds = np.asarray(thresholds, np.float32)
    correct = np.zeros((len(best_iou), len(thresholds)), bool)
    order = np.flatnonzero(best_iou >= thresholds.min(initial=np.inf))  # others, most of them, reach none
    order = order[np.argsort(best_label[order], kind="stable")]  # label by label, by falling confidence within
    able = best_iou[order, None] >= thresholds
    so_far = able.cumsum(0)
    starts = np.searchsorted(best_label[order], best_label[order])  # where each one's label begins
    before = np.where(starts[:, None] > 0, so_far[starts - 1], 0)
    correct[order] = able & (so_far - before == 1)
    return correct


def best_labels(
    detections: Sequence[np.ndarray], labels: Sequence[np.ndarray], any_class: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The label that each detection overlaps most, of its image and class, or with ``any_class`` of its image.

    Arguments as :func:`match_predictions`. Returns (N,) float32 IoU, -1 where there is no such label, and (N,) int64
    the label's place among those of all images, one after another: the first of equals, the first of the image where
    there is none of the class, 0 where there is none at all.
    """
    found, given = joined(detections, 6), joined(labels, 5)
    groups, others = image_of(detections), image_of(labels)
    place = np.searchsorted(others, groups) * np.isin(groups, others)  # the first label of the image
    if not any_class:
        kinds = 1 + int(max(found[:, 5].max(initial=0), given[:, 0].max(initial=0)))
        groups, others = groups * kinds + found[:, 5].astype(np.int64), others * kinds + given[:, 0].astype(np.int64)
    order = np.argsort(others, kind="stable")  # labels of a group one after another, in their order
    begins, ends = (np.searchsorted(others[order], groups, side) for side in ("left", "right"))
    partners = ends - begins  # of each detection: so many labels, from this one on
    boxes, truths = np.ascontiguousarray(found[:, :4].T), np.ascontiguousarray(given[order, 1:5].T)
    best = np.full(len(found), -1, np.float32)
    for part in _portions(partners):
        row = np.repeat(np.arange(part.start, part.stop), partners[part])
        if not len(row):
            continue
        last = partners[part].cumsum()
        column = np.arange(len(row)) + np.repeat(begins[part] - last + partners[part], partners[part])
        iou = paired_iou(boxes.take(row, 1), truths.take(column, 1))  # take: a third of the time of [:, row]
        some = partners[part] > 0
        best[part][some] = np.maximum.reduceat(iou, (last - partners[part])[some])
        hits = np.flatnonzero(iou == best.take(row))[::-1]
        place[row[hits]] = order[column[hits]]  # of several the one written last: the first
    return best, place


def joined(parts: Sequence[np.ndarray], width: int) -> np.ndarray:
    """The rows of all images, one after another, (N, ``width``) float32."""
    return np.concatenate([np.empty((0, width), np.float32), *(np.asarray(part, np.float32) for part in parts)])


def image_of(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) int64: the image of each of the rows of all images."""
    return np.repeat(np.arange(len(parts)), [len(rows) for rows in parts])


def _portions(partners: np.ndarray) -> Iterator[slice]:
    """Detections that have no more than MOST_PAIRS pairs together, or a single one that has."""
    done, pairs = 0, partners.cumsum()
    while done < len(partners):
        before = pairs[done - 1] if done else 0
        end = max(int(np.searchsorted(pairs, before + MOST_PAIRS, side="right")), done + 1)
        yield slice(done, end)
        done = end
