"""--show-offsets: for the surest objects of a picture, where each DCN layer samples, and what the last one sees.

One row an object, one panel a DCN layer: its points for the output nearest to the object's centre, large and yellow
where the mask is near 1, small and violet near 0; crosses where a plain convolution would sample. Then a panel with the
points of all layers composed, and one with the effective receptive field of the last layer (models/sampling.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from models.api import Detector
from models.sampling import Sampling, look
from utils.augmentations import Letterbox
from utils.frames import Frame
from utils.plots import write_image
from utils.safe_names import UniqueNames

OBJECTS, PANEL, GAP, TITLE = 3, 288, 4, 22
"""Objects a picture; pixels of a panel's side, between panels, and of the line above them."""
MOST_LAYERS = 6
MARGIN = 1.4
"""A panel shows this many times what the object and its points take up."""


class OffsetPictures:
    """Writes ``offsets/NAME.jpg`` for each picture and for the first frame of each video; called with a frame and its
    detections (n, 6) in pixels of the frame. ``written`` counts them: without a detection there is none."""

    def __init__(self, detector: Detector, imgsz: tuple[int, int], folder: Path) -> None:
        self._detector, self._imgsz, self._folder = detector, imgsz, folder / "offsets"
        self._unique, self._seen, self.written = UniqueNames(), set(), 0

    def __call__(self, frame: Frame, detections: Tensor) -> None:
        if (frame.path, frame.item) in self._seen:
            return
        self._seen.add((frame.path, frame.item))
        batch, (letterbox,) = self._detector.prepare([frame.image], self._imgsz)
        picture = offset_picture(
            frame.image, detections, self._detector.names, look(self._detector.model, batch), letterbox
        )
        if picture is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_image(self._folder / f"{self._unique.take(Path(frame.name).stem)}.jpg", picture)
            self.written += 1


def offset_picture(
    image: np.ndarray, detections: Tensor, names: Mapping[int, str], sampling: Sampling, letterbox: Letterbox
) -> np.ndarray | None:
    """uint8 RGB panels for the surest of ``detections`` (n, 6) in pixels of ``image``; None without any."""
    rows = [
        _row(image, box[:4], f"{names.get(int(box[5]), int(box[5]))} {box[4]:.2f}", sampling, letterbox)
        for box in detections[:OBJECTS].tolist()
    ]
    return np.concatenate(rows) if rows else None


def _composed(depth: int, layers: int) -> str:
    return f"{layers} layers composed" if depth == layers else f"last {depth} of {layers} layers composed"


def _row(image: np.ndarray, box: Sequence[float], label: str, sampling: Sampling, letterbox: Letterbox) -> np.ndarray:
    """The panels of one object, side by side."""
    centre = torch.tensor([(box[1] + box[3]) / 2, (box[0] + box[2]) / 2])
    place = to_network(centre, letterbox)
    layers = sampling.layers[-MOST_LAYERS:]
    found = []
    for layer in layers:
        cell = layer.cells(place)[None]
        points, masks = layer.points(cell)
        found.append((points[0], masks[0], layer.rest(cell)[0]))
    cloud, weights, depth = sampling.cloud(place)
    window = _window(image.shape[:2], box, [to_image(points, letterbox) for points, _, _ in found])
    panels = []
    for number, (layer, (points, masks, rest)) in enumerate(zip(layers, found)):
        moved = (points.unflatten(0, (-1, len(rest))) - rest).norm(dim=2).mean()
        title = f"{label}: layer {layer.name}" if number == 0 else f"layer {layer.name}"
        panel = _crop(image, window)
        _draw_crosses(panel, _in_panel(to_image(rest, letterbox), window))
        _draw_points(panel, _in_panel(to_image(points, letterbox), window), masks.numpy(), 5)
        panels.append(_finish(panel, box, window, f"{title}, moved {moved:.1f} px"))
    panel = _crop(image, window)
    _draw_points(panel, _in_panel(to_image(cloud, letterbox), window), (weights / weights.max()).numpy(), 2)
    panels.append(_finish(panel, box, window, _composed(depth, len(sampling.layers))))
    field = _field_over(image.shape[:2], sampling.effective_field(place).numpy(), letterbox)
    panels.append(_finish(_heat(_crop(image, window), _crop(field, window)), box, window, "effective receptive field"))
    return _side_by_side(panels)


def to_network(places: Tensor, letterbox: Letterbox) -> Tensor:
    """(..., 2) (y, x) pixels of the image file -> of the network's image."""
    scale, shift = (places.new_tensor(pair[::-1]) for pair in (letterbox.ratio, letterbox.pad))
    return places * scale + shift


def to_image(places: Tensor, letterbox: Letterbox) -> Tensor:
    """The way back of :func:`to_network`."""
    scale, shift = (places.new_tensor(pair[::-1]) for pair in (letterbox.ratio, letterbox.pad))
    return (places - shift) / scale


def _window(size: Sequence[int], box: Sequence[float], points: Sequence[Tensor]) -> tuple[float, float, float]:
    """(top, left, side) in pixels of the image: a square around the object and nearly all of its points."""
    y, x = (box[1] + box[3]) / 2, (box[0] + box[2]) / 2
    away = torch.cat(points) - torch.tensor([y, x])
    reach = max(float(away.abs().amax(1).nan_to_num(0).quantile(0.9)), (box[2] - box[0]) / 2, (box[3] - box[1]) / 2, 8)
    side = 2 * MARGIN * min(reach, max(size))
    return y - side / 2, x - side / 2, side


def _crop(image: np.ndarray, window: tuple[float, float, float]) -> np.ndarray:
    """The window as a (PANEL, PANEL, ...) picture of its own; grey beyond the image."""
    top, left, side = window
    scale = PANEL / side
    matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    matrix[:, 2] += scale / 2 - 0.5  # OpenCV counts from the middle of pixel 0
    grey = 0 if image.ndim == 2 else (114, 114, 114)
    return cv2.warpAffine(image, matrix, (PANEL, PANEL), flags=cv2.INTER_LINEAR, borderValue=grey)


def _in_panel(places: Tensor, window: tuple[float, float, float]) -> np.ndarray:
    """(n, 2) (y, x) pixels of the image -> (n, 2) (x, y) pixels of the panel; far away and NaN ones just outside."""
    top, left, side = window
    panel = (places - torch.tensor([top, left])) * (PANEL / side)
    return panel.flip(-1).nan_to_num(-2 * PANEL).clamp(-2 * PANEL, 3 * PANEL).numpy()


def _draw_crosses(panel: np.ndarray, places: np.ndarray) -> None:
    for x, y in places.round().astype(int).tolist():
        cv2.drawMarker(panel, (x, y), (0, 0, 0), cv2.MARKER_CROSS, 9, 3)
        cv2.drawMarker(panel, (x, y), (255, 255, 255), cv2.MARKER_CROSS, 7, 1)


def _draw_points(panel: np.ndarray, places: np.ndarray, weights: np.ndarray, radius: float) -> None:
    """Discs of an area and a colour that follow the weight; the heaviest on top."""
    colours = cv2.applyColorMap((np.nan_to_num(weights) * 255).astype(np.uint8)[:, None], cv2.COLORMAP_PLASMA)[:, 0]
    for index in np.argsort(weights).tolist():
        x, y = (places[index] * 16).round().astype(int).tolist()
        size = max(1.0, radius * math.sqrt(max(float(np.nan_to_num(weights[index])), 0.0)))
        if radius > 2:
            cv2.circle(panel, (x, y), round(16 * (size + 1.2)), (0, 0, 0), -1, cv2.LINE_AA, 4)
        cv2.circle(panel, (x, y), round(16 * size), tuple(colours[index][::-1].tolist()), -1, cv2.LINE_AA, 4)


def _field_over(size: Sequence[int], field: np.ndarray, letterbox: Letterbox) -> np.ndarray:
    """The network's (H, W) field laid over an image of ``size``: float32, the largest value 1."""
    (rx, ry), (px, py) = letterbox.ratio, letterbox.pad
    matrix = np.array([[1 / rx, 0, (0.5 - px) / rx - 0.5], [0, 1 / ry, (0.5 - py) / ry - 0.5]])
    laid = cv2.warpAffine(field, matrix, (size[1], size[0]), flags=cv2.INTER_LINEAR)
    laid = cv2.GaussianBlur(laid, (0, 0), max(size) / 300)
    return laid / max(float(laid.max()), 1e-30)


def _heat(panel: np.ndarray, field: np.ndarray) -> np.ndarray:
    """The panel with the field glowing over it; the square root, for fields fall off like a bell."""
    strength = np.sqrt(np.nan_to_num(field).clip(0, 1))[..., None]
    colours = cv2.cvtColor(
        cv2.applyColorMap((255 * strength).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB
    )
    share = 0.15 + 0.65 * strength
    return (panel * (1 - share) + colours * share).astype(np.uint8)


def _finish(panel: np.ndarray, box: Sequence[float], window: tuple[float, float, float], title: str) -> np.ndarray:
    """The panel with the object's box and a line of text above."""
    corners = _in_panel(torch.tensor([[box[1], box[0]], [box[3], box[2]]]), window).round().astype(int).tolist()
    cv2.rectangle(panel, corners[0], corners[1], (80, 255, 80), 1)
    head = np.zeros((TITLE, PANEL, 3), np.uint8)
    cv2.putText(
        head,
        title.encode("ascii", "replace").decode(),
        (4, 15),
        cv2.FONT_HERSHEY_SIMPLEX,
        0.4,
        (255,) * 3,
        1,
        cv2.LINE_AA,
    )
    return np.concatenate((head, panel))


def _side_by_side(panels: Sequence[np.ndarray]) -> np.ndarray:
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    pieces = [piece for panel in panels for piece in (panel, gap)]
    return np.concatenate(pieces[:-1], 1)
