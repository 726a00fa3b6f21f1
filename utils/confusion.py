"""Confusion matrix of a detector: which class was taken for which, what was missed, what was invented."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.matching import best_labels, image_of, joined


class ConfusionMatrix:
    """Counts (nc+1, nc+1) float64 in ``matrix``: rows predicted, columns true, the last of each is the background.

    Counted are detections above ``conf`` that overlap a label of any class by more than ``iou``.
    """

    def __init__(self, nc: int, conf: float = 0.25, iou: float = 0.45) -> None:
        self.nc, self.conf, self.iou = nc, conf, iou
        self.matrix = np.zeros((nc + 1, nc + 1))

    def update(self, detections: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> None:
        """Add some images: of each ``detections`` (n, 6) corner box in pixels, confidence, class, and ``labels`` (m, 5)
        class, box.

        Two habits of upstream are kept, so that matrices compare: an image without labels adds nothing, and
        detections without a partner count as false alarms only where the image has at least one matched pair.
        """
        sure = [rows[rows[:, 4] > self.conf] for rows in (np.asarray(part, np.float32) for part in detections)]
        found, given = joined(sure, 6), joined(labels, 5)
        true, predicted = given[:, 0].astype(np.int64), found[:, 5].astype(np.int64)
        label_of, detection_of = self._pairs(*best_labels(sure, labels, any_class=True))

        np.add.at(self.matrix, (predicted[detection_of], true[label_of]), 1)
        np.add.at(self.matrix[self.nc], np.delete(true, label_of), 1)  # missed
        image = image_of(sure)
        invented = np.isin(image, image[detection_of])
        invented[detection_of] = False
        np.add.at(self.matrix[:, self.nc], predicted[invented], 1)

    def _pairs(self, best_iou: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels and detections of the pairs, given each detection's best label: each label with the best of those."""
        able = np.flatnonzero(best_iou > self.iou)
        able = able[np.argsort(-best_iou[able], kind="stable")]
        matched, first = np.unique(label[able], return_index=True)
        return matched, able[first]
