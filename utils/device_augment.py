"""Colours and mirrors of a whole batch on the training device: the last, per-pixel steps of the augmentation.

The same arithmetic as :func:`utils.augmentations.finish`, OpenCV's 8-bit HSV with its roundings, so that both give the
same pictures from the same draws but for a level or two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 4
"""Images coloured together: as float32 a 640 px image takes 4.9 MB, and some six copies of that are needed."""


class Finish(NamedTuple):
    """What is left to do to an image: factors of hue, saturation and value, and whether to mirror it."""

    factors: tuple[float, float, float]
    up_down: bool
    left_right: bool


def pack(finishes: list[Finish]) -> Tensor:
    """(B, 5) float32: factors, up_down, left_right."""
    return torch.tensor([[*f.factors, f.up_down, f.left_right] for f in finishes], dtype=torch.float32)


def finish_batch(images: Tensor, finishes: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) RGB on any device and :func:`pack`'s (B, 5) on the CPU -> uint8 of the same shape, channels
    last in memory, on the images' device. Nothing waits for the device."""
    mirrored, coloured = finishes[:, 3:].bool(), (finishes[:, :3] != 1).any()
    there = finishes.to(images.device, non_blocking=True)
    for column, axis in ((3, 2), (4, 3)):
        if mirrored[:, column - 3].any():
            images = torch.where(there[:, column].bool()[:, None, None, None], images.flip(axis), images)
    if coloured:
        parts = [recolour(part, there[at : at + AT_ONCE, :3]) for at, part in _parts(images)]
        images = torch.cat(parts) if len(parts) > 1 else parts[0]
    return images.contiguous(memory_format=torch.channels_last)


def _parts(images: Tensor) -> list[tuple[int, Tensor]]:
    return [(at, images[at : at + AT_ONCE]) for at in range(0, len(images), AT_ONCE)]


def recolour(images: Tensor, factors: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) RGB with hue, saturation and value multiplied by (B, 3) factors, each image its own."""
    hue_gain, saturation_gain, value_gain = factors[:, :, None, None].unbind(1)
    red, green, blue = images.float().unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    hue = _hue(red, green, blue, value, chroma)
    saturation = (chroma * 255 / value.clamp(min=1)).round_()
    # fractions are cut off, the hue goes round at 180, the others stop at 255
    hue = hue.mul_(hue_gain).floor_().remainder_(180).div_(30)
    saturation = saturation.mul_(saturation_gain).floor_().clamp_(0, 255)
    value = value.mul_(value_gain).floor_().clamp_(0, 255)
    chroma = saturation.mul_(value).div_(255)
    out = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):  # en.wikipedia.org/wiki/HSL_and_HSV, "HSV to RGB alternative"
        sector = (hue + offset).remainder_(6)
        share = torch.minimum(sector, 4 - sector).clamp_(0, 1)
        out[:, channel] = value.addcmul(share, chroma, value=-1)  # cut to whole numbers, as OpenCV does
    return out


def _hue(red: Tensor, green: Tensor, blue: Tensor, value: Tensor, chroma: Tensor) -> Tensor:
    """Hue 0..179 in whole numbers, 0 for grey."""
    safe = chroma.clamp(min=1)
    from_red = (green - blue) / safe
    from_green = (blue - red) / safe + 2
    from_blue = (red - green) / safe + 4
    hue = torch.where(value == red, from_red, torch.where(value == green, from_green, from_blue))
    return hue.mul_(30).round_().remainder_(180)
