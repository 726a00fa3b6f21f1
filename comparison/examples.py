"""Which images a report shows, and their pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch

from comparison.matching import Predictions
from comparison.report import Example
from models.results import draw_boxes
from utils.console import LOGGER
from utils.errors import DataError
from utils.images import read_image
from utils.matching import match_predictions
from utils.plots import class_colour, draw_detections
from utils.safe_names import printable

CONFIDENCE = 0.25
SHOWN = 6
"""Images, half of them better with the first model and half worse."""

SIDE = 480
"""Pixels of a picture's longer side in the report."""


def examples(
    predictions: Mapping[str, Predictions], names: Mapping[int, str], count: int = SHOWN
) -> tuple[Example, ...]:
    """Pictures of the images on which the models differ most, in both directions. ``predictions``: one a model, of the
    same images in the same order. An image that cannot be read any more is left out."""
    found = []
    for index in choose(predictions, count):
        try:
            found.append(_example(predictions, index, names))
        except DataError as error:
            LOGGER.warning(f"no example of it: {error}")
    return tuple(found)


def choose(predictions: Mapping[str, Predictions], count: int = SHOWN) -> list[int]:
    """Numbers of the images: by the F1 of the other models' best less that of the first, the highest and the lowest.
    With a single model its best and worst images."""
    scores = np.array([[image_f1(*p.of_image(i)) for i in range(len(p.paths))] for p in predictions.values()])
    gain = scores[1:].max(0) - scores[0] if len(scores) > 1 else scores[0]
    order = np.argsort(-gain, kind="stable").tolist()
    if len(order) <= count:
        return order
    return order[: count - count // 2] + order[len(order) - count // 2 :]


def image_f1(detections: np.ndarray, labels: np.ndarray) -> float:
    """F1 of one image at IoU 0.5 for detections (n, 6) of CONFIDENCE and more; 1 when there is nothing to find and
    nothing was found."""
    sure = detections[detections[:, 4] >= CONFIDENCE]
    if not len(sure) and not len(labels):
        return 1.0
    right = int(match_predictions([sure], [labels], np.array([0.5])).sum())
    return 2 * right / (len(sure) + len(labels))


def _example(predictions: Mapping[str, Predictions], index: int, names: Mapping[int, str]) -> Example:
    first = next(iter(predictions.values()))
    path, labels = first.paths[index], first.of_image(index)[1]
    image, factor = _reduced(read_image(path))
    classes = labels[:, 0].astype(int).tolist()
    shown, colours = [names.get(c, str(c)) for c in classes], [class_colour(c) for c in classes]
    pictures = [("labels", jpeg(draw_detections(image, labels[:, 1:5] * factor, shown, colours)))]
    for model, found in predictions.items():
        detections = found.of_image(index)[0]
        score = image_f1(detections, labels)
        sure = detections[detections[:, 4] >= CONFIDENCE] * np.float32([factor] * 4 + [1, 1])
        drawn = draw_boxes(image, torch.from_numpy(sure), dict(names))
        pictures.append((f"{model} (F1 {score:.2f})", jpeg(drawn)))
    return Example(printable(Path(path).name), tuple(pictures))


def _reduced(image: np.ndarray) -> tuple[np.ndarray, float]:
    """The picture, no larger than SIDE, and the factor that boxes shrink by."""
    height, width = image.shape[:2]
    factor = min(1.0, SIDE / max(height, width))
    if factor == 1.0:
        return image, factor
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), factor


def jpeg(image: np.ndarray) -> bytes:
    """RGB uint8 (H, W, 3) as a JPEG."""
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
