"""Non-maximum suppression of decoded predictions. The result never depends on how fast the machine is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from utils.batched_nms import RecordedStep, apart, suppress
from utils.boxes import cxcywh_to_xyxy
from utils.config import check_thresholds

MAX_CANDIDATES = 30_000
"""At most this many boxes an image, the highest scores, enter suppression: the bound on time and memory."""

FEW = 1000
"""Up to so many boxes of a single image go from a GPU to the CPU: less work than launching some sixty kernels."""

BLOCK = 1024
"""So many candidates at a time go through suppression, until enough are kept."""


def non_max_suppression(
    pred: Tensor,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    max_det: int = 300,
    labels: Sequence[Tensor] = (),
    recorded: RecordedStep | None = None,
) -> list[Tensor]:
    """Greedy NMS, image by image.

    ``pred`` (B, N, 5+nc): cx, cy, w, h in network pixels, objectness, class probabilities; it is not modified.
    A box's score in a class is objectness x probability; boxes and objectness must exceed ``conf_thres`` (strictly).
    ``multi_label`` keeps a box once for every class that exceeds it, otherwise only in its best class.
    ``classes`` keeps only these; ``agnostic`` lets boxes of different classes suppress each other.
    ``labels``: one (m, 5) tensor an image, class, cx, cy, w, h in network pixels, that join as certain detections.
    ``recorded``: what a GPU does block by block, for the same thresholds.

    Returns a list over B of (n, 6) float32, n <= ``max_det``: x1, y1, x2, y2 in network pixels, score, class, by
    falling score; on the device of ``pred``, or on the CPU for few boxes of one image. Rows with non-finite boxes or
    scores are left out. Raises ConfigError for a bad threshold.
    """
    check_thresholds(conf_thres, iou_thres, max_det)
    multi_label = multi_label and pred.shape[2] > 6
    if _goes_at_once(pred.device):
        if len(pred) == 1 and not len(labels):
            rows = pred[0][pred[0, :, 4] > conf_thres].float()
            if len(rows) <= FEW:
                candidates, _ = _candidates(rows.cpu(), conf_thres, multi_label, classes)
                return [_suppress(candidates, iou_thres, agnostic, max_det)]
        return _all_at_once(pred, conf_thres, iou_thres, classes, agnostic, multi_label, max_det, labels, recorded)
    found = []
    for index, rows in enumerate(pred):
        rows = rows[rows[:, 4] > conf_thres].float()
        if len(labels):
            rows = torch.cat((rows, _label_rows(labels[index].to(rows), rows.shape[1])))
        candidates, _ = _candidates(rows, conf_thres, multi_label, classes)
        found.append(_suppress(candidates, iou_thres, agnostic, max_det))
    return found


def _goes_at_once(device: torch.device) -> bool:
    return device.type == "cuda"


def _all_at_once(
    pred, conf_thres, iou_thres, classes, agnostic, multi_label, max_det, labels, recorded
) -> list[Tensor]:
    """The same for all images together: a GPU is waited for some eight times, not at every step of every image."""
    alive = pred[..., 4] > conf_thres
    rows, images = pred[alive].float(), alive.nonzero()[:, 0]
    if len(labels):
        given = [_label_rows(label.to(rows), rows.shape[1]) for label in labels]
        numbers = [images.new_full((len(label),), index) for index, label in enumerate(labels)]
        rows, images = torch.cat((rows, *given)), torch.cat((images, *numbers))
    candidates, row = _candidates(rows, conf_thres, multi_label, classes)
    images = images[row]
    order = candidates[:, 4].argsort(descending=True, stable=True)
    order = order[images[order].argsort(stable=True)]
    candidates, images = candidates[order], images[order]
    classes = None if agnostic else candidates[:, 5]
    kept = suppress(candidates[:, :4], classes, images, len(pred), iou_thres, MAX_CANDIDATES, max_det, recorded)
    return list(candidates[torch.cat(kept)].split([len(indices) for indices in kept])) if kept else []


def _label_rows(labels: Tensor, width: int) -> Tensor:
    """(m, 5) class, box -> (m, 5+nc) rows with objectness 1 and probability 1 in their class."""
    rows = labels.new_zeros(len(labels), width)
    rows[:, :4] = labels[:, 1:5]
    rows[:, 4] = 1.0
    rows[torch.arange(len(labels), device=labels.device), 5 + labels[:, 0].long()] = 1.0
    return rows


def _candidates(
    rows: Tensor, conf_thres: float, multi_label: bool, classes: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """(n, 5+nc) -> (k, 6) corner box, score, class, of those above the threshold, finite and wanted; (k,) their row."""
    scores = rows[:, 5:] * rows[:, 4:5]
    boxes = cxcywh_to_xyxy(rows[:, :4])
    good = (scores > conf_thres) & boxes.isfinite().all(1, keepdim=True)
    if not multi_label:
        good &= torch.zeros_like(good).scatter_(1, scores.argmax(1, keepdim=True), True)
    if classes is not None:
        wanted = torch.as_tensor(list(classes), device=rows.device, dtype=torch.long)
        good &= torch.isin(torch.arange(scores.shape[1], device=rows.device), wanted)
    row, cls = good.nonzero(as_tuple=True)
    return torch.cat((boxes[row], scores[row, cls, None], cls[:, None].to(boxes.dtype)), 1), row


def _suppress(candidates: Tensor, iou_thres: float, agnostic: bool, max_det: int) -> Tensor:
    """(k, 6) -> (n, 6) by falling score, without those that overlap a better one of their class too much."""
    if len(candidates) == 0:
        return candidates
    candidates = candidates[candidates[:, 4].argsort(descending=True, stable=True)[:MAX_CANDIDATES]]
    boxes = candidates[:, :4]
    if not agnostic:
        (boxes,) = apart(boxes[None], candidates[None, :, 5], boxes.new_ones(1, len(boxes), dtype=torch.bool))
    # Block by block, by falling score: what survived so far meets the next block. The survivors are those of one call
    # with everything, which would compare each box with all others: its cost grows with the square.
    nms, kept = _kernel(), torch.arange(0, device=boxes.device)
    for start in range(0, len(boxes), BLOCK):
        pool = torch.cat((kept, torch.arange(start, min(start + BLOCK, len(boxes)), device=boxes.device)))
        kept = pool[nms(boxes[pool], candidates[pool, 4], iou_thres)]  # by falling score
        if len(kept) >= max_det:
            break
    return candidates[kept[:max_det]]


@lru_cache(maxsize=1)
def _kernel() -> Callable[[Tensor, Tensor, float], Tensor]:
    """torchvision's nms: boxes (k, 4), scores (k,), IoU threshold -> (n,) indices kept, by falling score.

    Its compiled library is loaded by itself: importing the package around it also imports torch's compiler and sympy,
    which takes a second, as long as torch itself.
    """
    spec = find_spec("torchvision")
    for file in sorted(Path(spec.origin).parent.glob("_C*.so")) if spec and spec.origin else ():
        try:
            torch.ops.load_library(file)
            return torch.ops.torchvision.nms
        except (OSError, AttributeError):  # a build of another layout, or one for another torch
            continue
    from torchvision.ops import nms

    return nms
