"""Detect: the last layer. Three anchors per cell and level, raw logits out, decoded on request."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.ops.precision import at_least_float32

DEEPEST = 32
"""Pixels. Backbones go down to this stride even where Detect does not (yolov5-p34)."""


def side_multiple(strides: Sequence[float] | Tensor) -> int:
    """What the sides of an input must be multiples of, in pixels, so that the maps of all levels fit together.

    ``strides`` (nl,) of Detect. Not just the largest of them: a backbone may shrink further and be enlarged again.
    """
    return max(int(max(strides)), DEEPEST)


class Detect(nn.Module):
    """One 1x1 convolution per level: features (B, C_i, H_i, W_i) -> logits (B, A, H_i, W_i, 5 + nc).

    The last axis is x, y, w, h, objectness, classes. In training the list of logits is returned; in eval the pair
    (decoded (B, N, 5 + nc), list of logits).

    State dict: ``anchors`` (nl, A, 2) in grid units (pixels / stride), then ``m.<level>.weight`` and ``.bias``.
    ``stride`` (nl,) in pixels is a buffer that follows ``.to()`` and stays out of the state dict.
    """

    def __init__(self, nc: int, anchors: Sequence[Sequence[float]], ch: Sequence[int]) -> None:
        """``anchors``: per level a flat list w, h, w, h, ... in pixels, until :meth:`set_anchors` gives the strides."""
        super().__init__()
        self.nc, self.no, self.nl, self.na = nc, nc + 5, len(anchors), len(anchors[0]) // 2
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32).view(self.nl, self.na, 2))
        self.register_buffer("stride", torch.ones(self.nl), persistent=False)
        self.m = nn.ModuleList(nn.Conv2d(channels, self.no * self.na, 1) for channels in ch)

    @torch.no_grad()
    def set_anchors(self, anchors: Sequence[Sequence[float]] | Tensor, strides: Sequence[float] | Tensor) -> None:
        """Take anchors in pixels, (nl, 2*A) or (nl, A, 2), and the strides of the levels.

        Levels are put in the order of the strides by their mean area, as a YAML may list the large anchors first.
        """
        stride = torch.as_tensor(strides, dtype=torch.float32, device="cpu")
        pixels = torch.as_tensor(anchors, dtype=torch.float32, device="cpu").reshape(self.nl, self.na, 2)
        areas = pixels.prod(-1).mean(-1)
        if (areas[-1] - areas[0]) * (stride[-1] - stride[0]) < 0:
            pixels = pixels.flip(0)
        self.stride.copy_(stride)
        self.anchors.copy_(pixels / stride.view(-1, 1, 1))

    @torch.no_grad()
    def initialize_biases(self, strides: Sequence[float]) -> None:
        """Start at the expected rates: about 8 objects per 640-pixel image and classes at 0.6 / nc (the prior of
        RetinaNet, arXiv 1708.02002, sec. 4.1). Adds to the biases: call once."""
        for conv, stride in zip(self.m, strides):
            bias = conv.bias.view(self.na, self.no)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.nc - 0.99999))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        raw = [self._logits(conv(x)) for conv, x in zip(self.m, features)]
        return raw if self.training else (self.decode(raw), raw)

    def _logits(self, y: Tensor) -> Tensor:
        batch, _, rows, columns = y.shape
        return y.view(batch, self.na, self.no, rows, columns).permute(0, 1, 3, 4, 2).contiguous()

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """Logits of all levels -> (B, N, 5 + nc) float32: cx, cy, w, h in network pixels, objectness, probabilities.

        With s = sigmoid(logit): centre = (2s - 0.5 + cell) * stride, size = (2s)^2 * anchor. Rows run over levels, then
        anchors, then cells row by row. Computed in float32 (float64 for float64 logits) whatever the model's dtype,
        because half precision cannot hold a coordinate of 1000 pixels to better than half a pixel.
        """
        return torch.cat([self._decode_level(level, y) for level, y in enumerate(raw)], 1)

    def _decode_level(self, level: int, y: Tensor) -> Tensor:
        batch, na, rows, columns, no = y.shape
        y = at_least_float32(y).sigmoid()
        stride = self.stride[level].to(y.dtype)
        pixels = (self.anchors[level].to(y.dtype) * stride).view(na, 1, 1, 2)
        row = torch.arange(rows, device=y.device, dtype=y.dtype) - 0.5
        column = torch.arange(columns, device=y.device, dtype=y.dtype) - 0.5
        grid = torch.stack((column.expand(rows, columns), row[:, None].expand(rows, columns)), -1)  # (rows, columns, 2)
        xy, wh, scores = y.split((2, 2, no - 4), -1)
        decoded = torch.cat(((xy * 2 + grid) * stride, (wh * 2).square() * pixels, scores), -1)
        return decoded.view(batch, na * rows * columns, no)
