"""Confusion matrix of a detector: which class was taken for which, what was missed, what was invented."""

from __future__ import annotations

import numpy as np

from utils.boxes import box_iou, row_maxima


class ConfusionMatrix:
    """Counts (nc+1, nc+1) float64 in ``matrix``: rows predicted, columns true, the last of each is the background.

    Counted are detections above ``conf`` that overlap a label of any class by more than ``iou``.
    """

    def __init__(self, nc: int, conf: float = 0.25, iou: float = 0.45) -> None:
        self.nc, self.conf, self.iou = nc, conf, iou
        self.matrix = np.zeros((nc + 1, nc + 1))

    def update(self, detections: np.ndarray, labels: np.ndarray) -> None:
        """Add one image: ``detections`` (n, 6) corner box in pixels, confidence, class; ``labels`` (m, 5) class, box.

        Two habits of upstream are kept, so that matrices compare: an image without labels adds nothing, and
        detections without a partner count as false alarms only where the image has at least one matched pair.
        """
        detections, labels = np.asarray(detections, np.float32), np.asarray(labels, np.float32)
        if len(labels) == 0:
            return
        detections = detections[detections[:, 4] > self.conf]
        true, predicted = labels[:, 0].astype(np.int64), detections[:, 5].astype(np.int64)
        label_of, detection_of = self._pairs(detections, labels)

        np.add.at(self.matrix, (predicted[detection_of], true[label_of]), 1)
        missed = np.delete(true, label_of)
        np.add.at(self.matrix, (np.full_like(missed, self.nc), missed), 1)
        if len(detection_of):
            invented = np.delete(predicted, detection_of)
            np.add.at(self.matrix, (invented, np.full_like(invented, self.nc)), 1)

    def _pairs(self, detections: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Label and detection indices of the pairs: each detection with its best label, then each label with the best
        of those."""
        if len(detections) == 0:
            return np.zeros(0, int), np.zeros(0, int)
        best_iou, label = row_maxima(box_iou(detections[:, :4], labels[:, 1:5]))
        able = np.flatnonzero(best_iou > self.iou)
        able = able[np.argsort(-best_iou[able], kind="stable")]
        matched, first = np.unique(label[able], return_index=True)
        return matched, able[first]
