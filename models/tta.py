"""Test-time augmentation: three passes over scaled and mirrored images, joined before NMS."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ensemble import Ensemble
from models.head import side_multiple

PASSES = ((1.0, False), (0.83, True), (0.67, False))
"""(scale, mirrored left to right)."""
GREY = 0.447
"""What fills the border of a scaled image: the mean of ImageNet."""


def augmented_forward(model: nn.Module, images: Tensor) -> Tensor:
    """images (B, C, H, W) float in 0..1, sides multiples of the stride -> decoded (B, N, 5 + nc) in their pixels.

    The model (DetectionModel or Ensemble) must be in eval mode. The full-scale pass leaves out its largest-stride
    level and the smallest pass its smallest-stride level, where the passes would repeat each other's work.
    """
    if isinstance(model, Ensemble):
        return torch.cat([augmented_forward(member, images) for member in model.models], 1)
    width, levels = images.shape[-1], len(model.stride)
    multiple = side_multiple(model.stride)
    outputs = []
    for scale, mirrored in PASSES:
        view = images.flip(-1) if mirrored else images
        decoded, _ = model(_scaled(view, scale, multiple))
        outputs.append(_restored(decoded, scale, mirrored, width))
    return torch.cat(_without_tails(outputs, levels), 1)


def _scaled(images: Tensor, scale: float, multiple: int) -> Tensor:
    """Resized by ``scale``, then padded right and below with grey up to multiples of ``multiple``."""
    if scale == 1.0:
        return images
    height, width = images.shape[-2:]
    resized = F.interpolate(images, (int(height * scale), int(width * scale)), mode="bilinear", align_corners=False)
    to_height, to_width = (math.ceil(side * scale / multiple) * multiple for side in (height, width))
    return F.pad(resized, (0, to_width - resized.shape[-1], 0, to_height - resized.shape[-2]), value=GREY)


def _restored(decoded: Tensor, scale: float, mirrored: bool, width: int) -> Tensor:
    """Rows in pixels of the original images."""
    boxes, scores = decoded[..., :4] / scale, decoded[..., 4:]
    if mirrored:
        boxes = torch.cat((width - boxes[..., :1], boxes[..., 1:]), -1)
    return torch.cat((boxes, scores), -1)


def _without_tails(outputs: list[Tensor], levels: int) -> list[Tensor]:
    """Rows of a level are 4 times those of the next: shares 4^(levels-1), ..., 4, 1 of the whole."""
    whole = sum(4**level for level in range(levels))
    first, *middle, last = outputs
    coarse = first.shape[1] // whole
    fine = last.shape[1] // whole * 4 ** (levels - 1)
    return [first[:, : first.shape[1] - coarse], *middle, last[:, fine:]]
