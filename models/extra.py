"""Blocks that the v6 files do not use: for older and experimental YAMLs. Letters as in :mod:`models.common`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.common import DCN, SPP, Bottleneck, Conv, PartialBlock, activation, batch_norm


class DWConvTranspose2d(nn.ConvTranspose2d):
    """Depthwise transposed convolution with bias; p1 is the padding, p2 the output padding."""

    def __init__(self, c1, c2, k=1, s=1, p1=0, p2=0) -> None:
        super().__init__(c1, c2, k, s, p1, p2, groups=math.gcd(c1, c2))


class Contract(nn.Module):
    """(B, c, H, W) -> (B, c*g*g, H/g, W/g): pixels into channels, channel = (row phase * g + column phase) * c + c'."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = self.gain
        x = x.view(b, c, h // g, g, w // g, g).permute(0, 3, 5, 1, 2, 4)  # (b, g, g, c, h/g, w/g)
        return x.reshape(b, c * g * g, h // g, w // g)


class Expand(nn.Module):
    """(B, c, H, W) -> (B, c/(g*g), H*g, W*g), the inverse of :class:`Contract`."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = self.gain
        x = x.view(b, g, g, c // (g * g), h, w).permute(0, 3, 4, 1, 5, 2)  # (b, c/g2, h, g, w, g)
        return x.reshape(b, c // (g * g), h * g, w * g)


class MixConv2d(nn.Module):
    """Convolutions of several kernel sizes side by side, then bn and ``join_act`` (arXiv 1907.09595).

    ``equal_ch`` gives each kernel the same number of output channels, else about the same number of weights.
    """

    def __init__(
        self, c1, c2, k: Sequence[int] = (1, 3), s=1, equal_ch: bool = True, *, join_act: bool | nn.Module = True
    ) -> None:
        super().__init__()
        split = _equal_channels(c2, len(k)) if equal_ch else _equal_weights(c2, k)
        self.m = nn.ModuleList(
            nn.Conv2d(c1, c, size, s, size // 2, groups=math.gcd(c1, c), bias=False) for size, c in zip(k, split)
        )
        self.bn = batch_norm(c2)
        self.act = activation(join_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(torch.cat([conv(x) for conv in self.m], 1)))


def _equal_channels(total: int, n: int) -> list[int]:
    """``total`` channels over ``n`` kernels: channel i of a ramp from 0 to just under n belongs to its floor."""
    step = (n - 1e-6) / max(total - 1, 1)
    owners = [int(i * step) for i in range(total)]
    return [owners.count(index) for index in range(n)]


def _equal_weights(total: int, kernels: Sequence[int]) -> list[int]:
    """Channels c_i with sum total and c_i * k_i^2 as equal as can be: c_i is in proportion to 1 / k_i^2."""
    shares = [1 / size**2 for size in kernels]
    return [round(total * share / sum(shares)) for share in shares]


class CrossConv(nn.Module):
    """A k x k convolution as 1 x k then k x 1, with the input added when ``shortcut`` and c1 = c2."""

    def __init__(self, c1, c2, k=3, s=1, g=1, e=1.0, shortcut=False, *, act: bool | nn.Module = True) -> None:
        super().__init__()
        h = int(c2 * e)
        self.cv1 = Conv(c1, h, (1, k), (1, s), act=act)
        self.cv2 = Conv(h, c2, (k, 1), (s, 1), g=g, act=act)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class BottleneckCSP(nn.Module):
    """Cross-stage partial block (arXiv 1911.11929) of YOLOv5 v4 and before: bn and ``join_act`` after the join, which
    is SiLU today and was LeakyReLU(0.1) when the other activations had already changed."""

    def __init__(
        self,
        c1,
        c2,
        n=1,
        shortcut=True,
        g=1,
        e=0.5,
        *,
        act: bool | nn.Module = True,
        join_act: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        h = int(c2 * e)
        self.cv1 = Conv(c1, h, act=act)
        self.cv2 = nn.Conv2d(c1, h, 1, bias=False)
        self.cv3 = nn.Conv2d(h, h, 1, bias=False)
        self.cv4 = Conv(2 * h, c2, act=act)
        self.bn = batch_norm(2 * h)
        self.act = activation(join_act)
        self.m = nn.Sequential(*(Bottleneck(h, h, shortcut, g, 1.0, act=act) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1)
        return self.cv4(self.act(self.bn(joined)))


class C3x(PartialBlock):
    """PartialBlock around n CrossConvs."""

    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5, *, act: bool | nn.Module = True) -> None:
        def inner(h: int) -> nn.Module:
            return nn.Sequential(*(CrossConv(h, h, 3, 1, g, 1.0, shortcut, act=act) for _ in range(n)))

        super().__init__(c1, c2, e, act, inner)


class C3SPP(PartialBlock):
    """PartialBlock around one SPP; n, shortcut and g are accepted for the common argument order."""

    def __init__(self, c1, c2, k=(5, 9, 13), n=1, shortcut=True, g=1, e=0.5, *, act: bool | nn.Module = True) -> None:
        super().__init__(c1, c2, e, act, lambda h: SPP(h, h, k, act=act))


class GDCNConv(nn.Module):
    """Grouped deformable sampling, then a 1x1 Conv that mixes, as DCNv3 (arXiv 2211.05778) and DCNv4 do: each ``width``
    channels sample at places of their own (separable offsets) and are weighed among themselves.

    At ``width`` 16 a 3x3 layer of 128 channels has a quarter of a DCN's weights. It does not start as a plain layer.
    """

    def __init__(self, c1, c2, k=3, s=1, p=None, d=1, width: int = 16, act: bool | nn.Module = True) -> None:
        super().__init__()
        if type(width) is not int or width < 1 or c1 % width:
            raise ValueError(f"GDCNConv: groups of {width!r} channels do not divide {c1}")
        groups = c1 // width
        self.dcn = DCN(c1, c1, k, s, p, d, groups, offset_groups=groups, separable=True)
        self.pw = Conv(c1, c2, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.dcn(x))


class C3GDCN(PartialBlock):
    """PartialBlock around n Bottlenecks whose 3x3 is a GDCNConv with groups of ``width`` channels."""

    def __init__(self, c1, c2, n=1, shortcut=True, e=0.5, width: int = 16, *, act: bool | nn.Module = True) -> None:
        def bottleneck(h: int) -> nn.Module:
            block = Bottleneck(h, h, shortcut, 1, 1.0, act=act)
            block.cv2 = GDCNConv(h, h, 3, width=width, act=act)
            return block

        super().__init__(c1, c2, e, act, lambda h: nn.Sequential(*(bottleneck(h) for _ in range(n))))
