"""Blocks of GhostNet (arXiv 1911.11907): half of the channels from a convolution, half from a cheap depthwise one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.common import Conv, DWConv, PartialBlock


class GhostConv(nn.Module):
    """(B, c1, H, W) -> (B, c2, H', W'): c2/2 channels by Conv, the others from those by a 5x5 depthwise Conv."""

    def __init__(self, c1, c2, k=1, s=1, g=1, act: bool | nn.Module = True) -> None:
        super().__init__()
        h = c2 // 2
        self.cv1 = Conv(c1, h, k, s, None, g, act=act)
        self.cv2 = Conv(h, h, 5, 1, None, h, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


class GhostBottleneck(nn.Module):
    """Ghost expand, depthwise stride (for s = 2), ghost project, plus a shortcut of the same shape."""

    def __init__(self, c1, c2, k=3, s=1, *, act: bool | nn.Module = True) -> None:
        super().__init__()
        h, down = c2 // 2, s == 2
        self.conv = nn.Sequential(
            GhostConv(c1, h, act=act),
            DWConv(h, h, k, s, act=False) if down else nn.Identity(),
            GhostConv(h, c2, act=False),
        )
        self.shortcut = (
            nn.Sequential(DWConv(c1, c1, k, s, act=False), Conv(c1, c2, act=False)) if down else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class C3Ghost(PartialBlock):
    """PartialBlock around n GhostBottlenecks; shortcut and g are accepted for the common argument order."""

    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5, *, act: bool | nn.Module = True) -> None:
        super().__init__(c1, c2, e, act, lambda h: nn.Sequential(*(GhostBottleneck(h, h, act=act) for _ in range(n))))
