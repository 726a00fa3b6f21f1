"""Whether an exported file computes what the model does: both see the same picture."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from utils.augmentations import letterbox
from utils.console import plural
from utils.device import to_network_input
from utils.errors import ExportError
from utils.nms import non_max_suppression

COMPARED = 1000
"""So many boxes of an image, those with the highest scores, are compared: the rest are never seen."""


@dataclass(frozen=True)
class Difference:
    """The largest between a file and the model: ``box`` in pixels, ``relative`` to the longer side of the box (at least
    32 pixels), ``score`` in confidence; ``boxes`` is how many were compared."""

    box: float
    relative: float
    score: float
    boxes: int

    def text(self) -> str:
        return f"largest difference to PyTorch {self.box:.2g} px, {self.score:.2g} in confidence ({self.boxes} boxes)"


LIMITS = {False: (1e-3, 1e-3), True: (3e-2, 3e-2)}
"""By ``half``: the largest relative and score difference that passes. Float32 runtimes sum in another order; float16
rounds every layer."""


BARELY = 0.05
"""Above the threshold of confidence: what the file finds below that, the model may miss."""


def input_batch(image: np.ndarray, imgsz: tuple[int, int], batch: int, device: torch.device) -> Tensor:
    """The picture, uint8 (H, W, 3) RGB, letterboxed, then its mirror image, in turns: (batch, 3, H, W) float32."""
    boxed, _ = letterbox(image, imgsz, auto=False)
    views = [boxed if number % 2 == 0 else boxed[:, ::-1] for number in range(batch)]
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(views))).permute(0, 3, 1, 2)
    return to_network_input(stacked, device).contiguous()


def difference(expected: Tensor, found: Tensor) -> Difference:
    """Between decoded predictions (B, N, 5 + nc) of the model and of the file: all scores, and the boxes with the
    highest. Raises ExportError for other shapes."""
    expected, found = expected.float().cpu(), found.float().cpu()
    if expected.shape != found.shape:
        raise ExportError(f"gives {tuple(found.shape)}, the model {tuple(expected.shape)}")
    scores = [(rows[..., 4:5] * rows[..., 5:]) for rows in (expected, found)]
    best = torch.maximum(*(each.amax(-1) for each in scores)).topk(min(COMPARED, expected.shape[1]), 1).indices
    best = best[..., None].expand(-1, -1, 4)  # (B, COMPARED, 4)
    apart, boxes = (expected - found).abs().gather(1, best), expected.gather(1, best)
    sides = boxes[..., 2:].amax(-1, keepdim=True).clamp(min=32)
    score = float((scores[0] - scores[1]).abs().max())
    return Difference(_largest(apart), _largest(apart / sides), score, apart[..., 0].numel())


def detection_difference(expected: Tensor, found: Tensor, conf: float, iou: float, max_det: int) -> Difference:
    """The same for a file with suppression inside: its boxes beside those that are suppressed here, at most ``max_det``
    a class.

    Raises ExportError where more than a few of the model's are missing or the file's are its own; boxes that only just
    pass ``conf`` or overlap by just ``iou`` may come or go.
    """
    values, missing, invented = [], 0, 0
    suppressed = (non_max_suppression(rows, conf, iou) for rows in (expected.float().cpu(), found.float().cpu()))
    for here, there in zip(*suppressed):
        for own in (row for cls in here[:, 5].unique() for row in here[here[:, 5] == cls][:max_det]):
            partner = _apart(own, there)
            if partner is None:
                missing += 1
            else:
                values.append(partner)
        invented += sum(_apart(row, here) is None for row in there[there[:, 4] > conf + BARELY])
    if missing > 0.05 * (missing + len(values)):
        raise ExportError(f"finds {len(values)} of the {missing + len(values)} objects that the model finds")
    if invented > 0.05 * (invented + len(values)):
        raise ExportError(f"finds {invented} objects that the model does not find, beside {len(values)} that it does")
    return Difference(*(max(column) for column in zip(*values, (0.0, 0.0, 0.0))), len(values))


@dataclass(frozen=True)
class Agreement:
    """Of the ``objects`` that the model finds on some ``pictures`` the file finds ``found``, and ``others`` that are
    its own."""

    pictures: int = 0
    objects: int = 0
    found: int = 0
    others: int = 0

    def __add__(self, more: Agreement) -> Agreement:
        return Agreement(*(getattr(self, each.name) + getattr(more, each.name) for each in fields(self)))

    def text(self) -> str:
        where = f"on {plural(self.pictures, 'picture')} of the data set"
        return f"finds {self.found} of the {self.objects} objects that PyTorch finds {where}, and {self.others} besides"


def agreement(expected: Tensor, found: Tensor, conf: float, iou: float, most: int = 0) -> Agreement:
    """Of decoded predictions (B, N, 5 + nc) of the model and of a file in eight bits.

    Objects of both have a confidence clearly above ``conf`` (by BARELY), their partners one that is not clearly below.
    ``most``: so many of a class the file gives at most, 0 for all; where it gives as many, the class is passed over.
    """
    objects = paired = others = 0
    sides = [non_max_suppression(rows.float().cpu(), max(conf - BARELY, 0), iou) for rows in (expected, found)]
    for here, there in zip(*sides):
        if most:
            full = [cls for cls in there[:, 5].unique() if int((there[:, 5] == cls).sum()) >= most]
            here, there = (rows[~torch.isin(rows[:, 5], torch.tensor(full))] for rows in (here, there))
        sure, theirs = here[here[:, 4] > conf + BARELY], there[there[:, 4] > conf + BARELY]
        objects += len(sure)
        paired += sum(_apart(row, there) is not None for row in sure)
        others += sum(_apart(row, here) is None for row in theirs)
    return Agreement(len(expected), objects, paired, others)


def refuse_if_other(seen: Agreement) -> None:
    """Raise ExportError where a file in eight bits misses more than a tenth of the objects, or finds as many others (of
    few objects two), and where there is nothing to tell by."""
    if not seen.objects:
        where = plural(seen.pictures, "picture")
        raise ExportError(
            f"PyTorch finds nothing on {where} of the data set, by which eight bits are compared: is it the set that "
            "the model was trained on, and long enough?"
        )
    if max(seen.objects - seen.found, seen.others) > max(0.1 * seen.objects, min(2, seen.objects / 2)):
        raise ExportError(f"does not find what the model does: {seen.text()}")


def _apart(row: Tensor, others: Tensor) -> tuple[float, float, float] | None:
    """How far the nearest of ``others`` (n, 6) of the class of ``row`` is from it: pixels, relative to its side, score;
    None where it is another object."""
    same = others[others[:, 5] == row[5]]
    apart = (same[:, :4] - row[:4]).abs().amax(-1)
    side = max(float((row[2:4] - row[:2]).max()), 32.0)
    if not len(same) or float(apart.min()) > side / 10:
        return None
    return float(apart.min()), float(apart.min()) / side, abs(float(same[apart.argmin(), 4] - row[4]))


def refuse_if_far(found: Difference, half: bool) -> None:
    """Raise ExportError for a difference beyond LIMITS, or one that is no number."""
    relative, score = LIMITS[half]
    if not (found.relative <= relative and found.score <= score):
        raise ExportError(f"does not compute what the model does: {found.text()}")


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
