"""Stored detections of upstream's yolov5n on BCCD val (87 images of 640 x 480): AP without a model.

tests/reference/bccd_detections.npz: boxes in 1/32 pixel, the root of the confidence in 1/65535, labels in 1/2 pixel,
so results agree with the unrounded ones to about 1e-4 only.
"""

from pathlib import Path

import numpy as np

NAMES = {0: "RBC", 1: "WBC", 2: "Platelets"}
SIZE = (480, 640)


def load() -> list[tuple[np.ndarray, np.ndarray]]:
    """One pair an image: detections (n, 6) corner box, confidence, class; labels (m, 5) class, corner box."""
    data = np.load(Path(__file__).parents[1] / "reference" / "bccd_detections.npz")
    detections = np.column_stack((data["boxes"] / 32, (data["conf"] / 65535) ** 2, data["cls"]))
    labels = data["labels"] / 2
    pairs, start = [], 0
    for image, count in enumerate(data["counts"].astype(int)):
        mine = labels[data["labels"][:, 0] == 2 * image][:, 1:]
        mine[:, 0] = mine[:, 0].round()
        pairs.append((detections[start : start + count], mine))
        start += count
    return pairs
