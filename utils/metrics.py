"""Average precision as YOLOv5 defines it: 101 recall points, IoU 0.5 to 0.95, P and R at the best mean F1.

The COCO definition, which differs in its matching and its 100 boxes an image, is in utils/coco_ap.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from utils.stages import speed_line

CURVE_POINTS = 1000
"""Samples of each curve between 0 and 1."""

_EPS = 1e-16


def iou_thresholds() -> np.ndarray:
    """The ten IoU thresholds 0.50, 0.55, ..., 0.95, float32."""
    return torch.linspace(0.5, 0.95, 10).numpy()


@dataclass(frozen=True, eq=False)
class ClassMetrics:
    """Results of the c classes that have labels; P, R, F1, tp and fp at the one confidence of the best mean F1.

    ``classes`` (c,) int; ``ap`` (c, t); ``p``, ``r``, ``f1`` (c,) in 0..1; ``tp``, ``fp``, ``n_labels`` (c,) counts;
    ``confidence``: that confidence. Curves over ``axis`` (1000,) from 0 to 1: ``p_curve``, ``r_curve``, ``f1_curve``
    (c, 1000) over confidence and ``pr_curve`` (c, 1000), precision over recall at IoU 0.5.
    """

    classes: np.ndarray
    ap: np.ndarray
    p: np.ndarray
    r: np.ndarray
    f1: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    n_labels: np.ndarray
    confidence: float
    axis: np.ndarray
    p_curve: np.ndarray
    r_curve: np.ndarray
    f1_curve: np.ndarray
    pr_curve: np.ndarray


def average_precision(recall: np.ndarray, precision: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Area under one precision-recall curve (k,), (k,) by rising recall.

    The curve starts at (0, 1) and ends at (1, 0); precision is made non-increasing; the area is a trapezoid sum over
    101 recall points, so that even a perfect detector reaches 0.995. Returns it and the completed curve (k+2,) each.
    """
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([1.0], precision, [0.0]))
    precision = np.flip(np.maximum.accumulate(np.flip(precision)))
    samples = np.interp(np.linspace(0, 1, 101), recall, precision)
    return float(((samples[1:] + samples[:-1]) / 2).sum() / 100), recall, precision


def smooth(y: np.ndarray, fraction: float = 0.05) -> np.ndarray:
    """Moving average of (k,) over an odd width near 2 x ``fraction`` x k; the ends are continued by their value."""
    width = round(len(y) * fraction * 2) // 2 + 1
    side = np.ones(width // 2)
    padded = np.concatenate((side * y[0], y, side * y[-1]))
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def ap_per_class(tp: np.ndarray, conf: np.ndarray, pred_cls: np.ndarray, target_cls: np.ndarray) -> ClassMetrics:
    """Average precision of every class that has labels.

    ``tp`` (n, t) bool from :func:`utils.matching.match_predictions`, column 0 at IoU 0.5; ``conf`` (n,), ``pred_cls``
    (n,) of the detections of all images; ``target_cls`` (m,) of the labels. Equal confidences keep the order given. A
    class without detections has AP, P and R 0.
    """
    conf, pred_cls = np.asarray(conf), np.asarray(pred_cls)
    by_class_and_conf = np.lexsort((-conf, pred_cls))  # stable, last key first
    tp, conf, pred_cls = np.asarray(tp)[by_class_and_conf], conf[by_class_and_conf], pred_cls[by_class_and_conf]
    classes, n_labels = np.unique(np.asarray(target_cls), return_counts=True)
    starts, ends = np.searchsorted(pred_cls, classes, "left"), np.searchsorted(pred_cls, classes, "right")

    axis = np.linspace(0, 1, CURVE_POINTS)
    ap = np.zeros((len(classes), tp.shape[1]))
    p_curve, r_curve, pr_curve = (np.zeros((len(classes), CURVE_POINTS)) for _ in range(3))
    for row, (start, end, count) in enumerate(zip(starts, ends, n_labels)):
        if start == end:
            continue
        hits = tp[start:end].cumsum(0)
        recall = hits / (count + _EPS)
        precision = hits / np.arange(1, end - start + 1)[:, None]
        falling = -conf[start:end]  # np.interp wants a rising axis
        r_curve[row] = np.interp(-axis, falling, recall[:, 0], left=0)
        p_curve[row] = np.interp(-axis, falling, precision[:, 0], left=1)
        for column in range(tp.shape[1]):
            ap[row, column], full_recall, full_precision = average_precision(recall[:, column], precision[:, column])
            if column == 0:
                pr_curve[row] = np.interp(axis, full_recall, full_precision)
    return _at_best_f1(classes.astype(int), ap, n_labels, axis, p_curve, r_curve, pr_curve)


def _at_best_f1(classes, ap, n_labels, axis, p_curve, r_curve, pr_curve) -> ClassMetrics:
    f1_curve = 2 * p_curve * r_curve / (p_curve + r_curve + _EPS)
    best = int(smooth(f1_curve.mean(0), 0.1).argmax()) if len(classes) else 0
    p, r, f1 = p_curve[:, best], r_curve[:, best], f1_curve[:, best]
    tp = (r * n_labels).round()
    fp = (tp / (p + _EPS) - tp).round()
    curves = (axis, p_curve, r_curve, f1_curve, pr_curve)
    return ClassMetrics(classes, ap, p, r, f1, tp, fp, n_labels, float(axis[best]), *curves)


def fitness(map50: float, map: float) -> float:
    """What "best" means when checkpoints are compared: 0.1 x mAP50 + 0.9 x mAP50-95."""
    return 0.1 * map50 + 0.9 * map


@dataclass(frozen=True, eq=False)
class Metrics:
    """The result of one evaluation. All scores are in 0..1 and 0 when nothing was right."""

    per_class: ClassMetrics
    images: int
    losses: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Mean box, obj, cls loss over the batches; zeros without a criterion."""
    speed: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds an image: pre-process, inference, NMS, matching."""
    shape: tuple[int, ...] = ()
    """(B, 3, H, W) of the first batch."""
    confusion: np.ndarray | None = None
    """(nc+1, nc+1) counts (utils.confusion)."""
    coco: Mapping[str, float] = field(default_factory=dict)
    """COCO's own numbers (utils.coco_ap.Evaluation), when they were asked for."""

    @property
    def p(self) -> float:
        """Mean precision over classes."""
        return _mean(self.per_class.p)

    @property
    def r(self) -> float:
        """Mean recall over classes."""
        return _mean(self.per_class.r)

    @property
    def map50(self) -> float:
        """Mean AP at IoU 0.5."""
        return _mean(self.per_class.ap[:, 0])

    @property
    def map(self) -> float:
        """Mean AP over IoU 0.5 to 0.95."""
        return _mean(self.per_class.ap)

    @property
    def ap(self) -> np.ndarray:
        """(c, 10) AP of each class with labels at each IoU threshold."""
        return self.per_class.ap

    @property
    def classes(self) -> np.ndarray:
        """(c,) numbers of the classes with labels."""
        return self.per_class.classes

    @property
    def labels(self) -> int:
        """How many labels there were."""
        return int(self.per_class.n_labels.sum())

    @property
    def fitness(self) -> float:
        """0.1 x mAP50 + 0.9 x mAP50-95."""
        return fitness(self.map50, self.map)

    def maps(self, nc: int) -> np.ndarray:
        """(nc,) AP50-95 of every class; classes without labels get the mean."""
        maps = np.full(nc, self.map)
        maps[self.per_class.classes] = self.per_class.ap.mean(1)
        return maps

    def row(self) -> list[float]:
        """P, R, mAP50, mAP50-95, val box, obj and cls loss: the middle of a results.csv row."""
        return [self.p, self.r, self.map50, self.map, *self.losses]

    def table(self, names: Mapping[int, str], verbose: bool = True) -> str:
        """The familiar rows (without header): all classes, then, if ``verbose`` and there are several, each class."""
        lines = [_ROW % ("all", self.images, self.labels, self.p, self.r, self.map50, self.map)]
        if verbose and len(names) > 1:
            c = self.per_class
            for i, number in enumerate(c.classes):
                ap = c.ap[i]
                name = names.get(int(number), str(number))
                lines.append(_ROW % (name, self.images, c.n_labels[i], c.p[i], c.r[i], ap[0], ap.mean()))
        return "\n".join(lines)

    def speed_line(self) -> str:
        """``Speed: 0.1ms pre-process, 8.0ms inference, ...`` an image."""
        return speed_line(self.speed, self.shape)


TABLE_HEADER = ("%22s" + "%11s" * 6) % ("Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95")
_ROW = "%22s" + "%11i" * 2 + "%11.3g" * 4


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0
