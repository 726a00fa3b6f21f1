"""Boxes: formats, overlap, clipping and the way back to the original image. Pure functions that return new tensors.

Formats are named, never implied: ``cxcywh`` is centre x, centre y, width, height; ``xyxy`` is left, top, right,
bottom. Every conversion keeps the unit it is given (pixels, grid cells or 0..1).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """(..., 4) centre form to (..., 4) corner form, same type, dtype and unit."""
    half = boxes[..., 2:4] / 2
    parts = (boxes[..., :2] - half, boxes[..., :2] + half)
    return np.concatenate(parts, -1) if isinstance(boxes, np.ndarray) else torch.cat(parts, -1)


def xyxy_to_cxcywh(boxes: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """(..., 4) corner form to (..., 4) centre form, same type, dtype and unit."""
    parts = ((boxes[..., :2] + boxes[..., 2:4]) / 2, boxes[..., 2:4] - boxes[..., :2])
    return np.concatenate(parts, -1) if isinstance(boxes, np.ndarray) else torch.cat(parts, -1)


def clip_xyxy(boxes: Tensor | np.ndarray, height: float, width: float) -> Tensor | np.ndarray:
    """(..., 4) corner boxes cut to [0, width] x [0, height] pixels; of arrays each may have its own (...)."""
    if isinstance(boxes, np.ndarray):
        return np.clip(boxes, 0, np.stack((width, height, width, height), -1).astype(boxes.dtype))
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), -1)


def box_iou(a: Tensor | np.ndarray, b: Tensor | np.ndarray, eps: float = 1e-7) -> Tensor | np.ndarray:
    """Overlap of every pair: a (N, 4), b (M, 4) corner boxes -> (N, M), same type and dtype; eps is added to the
    union."""
    if isinstance(a, np.ndarray):
        return paired_iou(np.ascontiguousarray(a.T)[:, :, None], np.ascontiguousarray(b.T)[:, None], eps)
    inter = (torch.min(a[:, None, 2:], b[None, :, 2:]) - torch.max(a[:, None, :2], b[None, :, :2])).clamp(0).prod(2)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    return inter / (area_a[:, None] + area_b[None] - inter + eps)


def paired_iou(a: np.ndarray, b: np.ndarray, eps: float = 1e-7) -> np.ndarray:
    """The same of boxes beside each other: (4, ...) and (4, ...) that broadcast -> (...); twice as fast as over rows of
    four."""
    width = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    height = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    inter = np.maximum(width, 0) * np.maximum(height, 0)
    area_a, area_b = ((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return inter / (area_a + area_b - inter + eps)


def ciou(pred: Tensor, target: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of matching rows, (N, 4) centre boxes each -> (N,); Zheng et al., arXiv 1911.08287, eq. 10-12.

    The trade-off weight alpha carries no gradient, as in the paper.
    """
    (px, py, pw, ph), (tx, ty, tw, th) = pred.unbind(-1), target.unbind(-1)
    p_left, p_right, p_top, p_bottom = px - pw / 2, px + pw / 2, py - ph / 2, py + ph / 2
    t_left, t_right, t_top, t_bottom = tx - tw / 2, tx + tw / 2, ty - th / 2, ty + th / 2
    inter_w = (torch.min(p_right, t_right) - torch.max(p_left, t_left)).clamp(0)
    inter_h = (torch.min(p_bottom, t_bottom) - torch.max(p_top, t_top)).clamp(0)
    inter = inter_w * inter_h
    iou = inter / (pw * ph + tw * th - inter + eps)
    hull_w = torch.max(p_right, t_right) - torch.min(p_left, t_left)
    hull_h = torch.max(p_bottom, t_bottom) - torch.min(p_top, t_top)
    distance = ((tx - px) ** 2 + (ty - py) ** 2) / (hull_w**2 + hull_h**2 + eps)
    shape = (4 / math.pi**2) * (torch.atan(tw / th) - torch.atan(pw / ph)) ** 2
    with torch.no_grad():
        alpha = shape / (1 - iou + shape + eps)
    return iou - (distance + shape * alpha)


def scale_to_original(
    boxes: Tensor | np.ndarray,
    input_hw: tuple[int, int],
    original_hw: tuple[int, int],
    gain: float | None = None,
    pad: tuple[float, float] | None = None,
) -> Tensor | np.ndarray:
    """Map (n, 4) corner boxes in network pixels to pixels of the original image, clipped to it; same type and dtype.

    Without ``gain`` and ``pad`` they follow from a centred letterbox of ``original_hw`` into ``input_hw``:
    gain = min of the two ratios, pad = half of what is left on each axis (x, y), unrounded. Given both, arrays of boxes
    may have an ``original_hw``, a ``gain`` and a ``pad`` each: (n,) numbers in the place of one.
    """
    (h, w), (h0, w0) = input_hw, original_hw
    if gain is None or pad is None:
        gain = min(h / h0, w / w0)
        pad = ((w - w0 * gain) / 2, (h - h0 * gain) / 2)
    shift = (pad[0], pad[1], pad[0], pad[1])
    if isinstance(boxes, np.ndarray):
        shift, gain = np.stack(shift, -1).astype(boxes.dtype), np.asarray(gain, boxes.dtype)[..., None]
    else:
        shift = boxes.new_tensor(shift)
    return clip_xyxy((boxes[..., :4] - shift) / gain, h0, w0)
