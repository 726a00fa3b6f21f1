"""Where the DCN layers of the compared models sample, on one of the example images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from comparison.examples import CONFIDENCE, choose, jpeg
from comparison.matching import Predictions
from engine.offset_pictures import offset_picture
from models.api import Detector
from models.common import DCN
from models.sampling import look
from utils.console import LOGGER
from utils.errors import DataError
from utils.images import read_image
from utils.safe_names import printable


def offset_examples(
    models: Mapping[str, nn.Module],
    predictions: Mapping[str, Predictions],
    imgsz: int,
    device: torch.device,
) -> tuple[tuple[str, bytes], ...]:
    """(caption, JPEG) for each of ``models`` that has DCN layers and found something of CONFIDENCE on one of the
    example images; as `detect.py --show-offsets` draws it."""
    chosen = choose(predictions)
    found = []
    for name, model in models.items():
        if any(isinstance(module, DCN) for module in model.modules()):
            picture = _first_picture(model, predictions[name], chosen, imgsz, device)
            if picture:
                found.append((f"{name} on {picture[0]}", picture[1]))
    return tuple(found)


def _first_picture(
    model: nn.Module, found: Predictions, chosen: Sequence[int], imgsz: int, device: torch.device
) -> tuple[str, bytes] | None:
    """File name and picture for the first of the images that has something to show."""
    detector = Detector(model, device)
    for index in chosen:
        detections = found.of_image(index)[0]
        sure = detections[detections[:, 4] >= CONFIDENCE]
        try:
            image = read_image(found.paths[index]) if len(sure) else None
        except DataError as error:
            LOGGER.warning(f"no offsets are shown on it: {error}")
            image = None
        if image is not None:
            return printable(Path(found.paths[index]).name), _draw(detector, image, sure, imgsz)
    return None


def _draw(detector: Detector, image: np.ndarray, detections: np.ndarray, imgsz: int) -> bytes:
    batch, (letterbox,) = detector.prepare([image], detector.round_size(imgsz))
    sampling = look(detector.model, batch)
    return jpeg(offset_picture(image, torch.from_numpy(detections), detector.names, sampling, letterbox))
