"""The convolutional blocks of YOLOv5, in order of increasing complexity.

Everywhere: c1 channels in, c2 channels out, k kernel, s stride, p padding (None keeps the size at stride 1), g groups,
d dilation, e the width of the hidden layer as a fraction of c2. Maps are (B, C, H, W). ``act`` is True for SiLU, a
module to use that one, False for none. Attribute names are the names in the state dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.offsets import offset_branch, start_at_zero
from models.ops.deform_conv import deform_conv2d_raw

Size = int | tuple[int, int]


def autopad(k: Size, p: Size | None = None, d: int = 1) -> Size:
    """The padding ``p`` as given, or half of the (dilated) kernel, which keeps the size at stride 1 for odd kernels."""
    if p is not None:
        return p
    if isinstance(k, int):
        return (d * (k - 1) + 1) // 2
    return tuple((d * (side - 1) + 1) // 2 for side in k)


def activation(act: bool | nn.Module) -> nn.Module:
    """The module that ``act`` stands for: SiLU for True, itself for a module, Identity otherwise."""
    if isinstance(act, nn.Module):
        return act
    return nn.SiLU() if act else nn.Identity()


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """The BatchNorm of every block: eps 1e-3 and momentum 0.03, with which all published weights were trained."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


class Conv(nn.Module):
    """conv -> bn -> act. (B, c1, H, W) -> (B, c2, H', W'), H' = floor((H + 2p - d(k-1) - 1)/s) + 1.

    :func:`models.surgery.fuse` folds ``bn`` into ``conv`` and leaves an Identity; the forward stays the same.
    """

    def __init__(self, c1, c2, k=1, s=1, p=None, g=1, d=1, act: bool | nn.Module = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, autopad(k, p, d), dilation=d, groups=g, bias=False)
        self.bn = batch_norm(c2)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class DWConv(Conv):
    """Depthwise Conv: as many groups as both channel counts allow."""

    def __init__(self, c1, c2, k=1, s=1, d=1, act: bool | nn.Module = True) -> None:
        super().__init__(c1, c2, k, s, g=math.gcd(c1, c2), d=d, act=act)


class DCN(nn.Module):
    """Deformable convolution v2 (arXiv 1811.11168, eq. 1). (B, c1, H, W) -> (B, c2, H', W'), no norm, no activation.

    The layer of the article, parameter names included: weight (c2, c1/g, kh, kw), bias (c2,), conv_offset_mask.weight
    (3*K*G, c1, kh, kw) and .bias for K = kh*kw taps and G offset groups. The channels of conv_offset_mask are 2*K*G
    offsets in input pixels, a (y, x) pair per tap, then K*G mask logits.

    conv_offset_mask starts at zero: every tap samples its regular place with mask sigmoid(0) = 0.5, so that at step 0
    the layer is half of a plain convolution.

    Beyond the article: each of ``offset_groups`` shares of the channels samples at its own places; ``separable`` makes
    conv_offset_mask a depthwise convolution and a 1x1 one (keys .depthwise.*, .pointwise.*); ``bound`` keeps offsets
    within so many pixels (0: free).
    """

    def __init__(
        self, c1, c2, k=3, s=1, p=None, d=1, g=1, offset_groups: int = 1, separable: bool = False, bound: float = 0.0
    ) -> None:
        super().__init__()
        for name, channels, groups in (("c1", c1, g), ("c2", c2, g), ("c1", c1, offset_groups)):
            if type(groups) is not int or groups < 1 or channels % groups:  # True is an int to isinstance
                raise ValueError(f"DCN: {groups!r} groups do not divide {name} = {channels}")
        if min(d if isinstance(d, Sequence) else (d,)) < 1:
            raise ValueError(f"DCN: dilation {d!r} would read one place with every tap")
        kernel = (k, k) if isinstance(k, int) else tuple(k)
        if min(kernel) < 1:
            raise ValueError(f"DCN: kernel {k!r}: 1 or more")
        self.stride, self.padding, self.dilation = s, autopad(k, p, d), d
        self.offset_groups = offset_groups
        self.backend = "auto"  # one of models.ops.deform_conv.BACKENDS
        self.silu = False  # applied to the result; models.surgery.fuse sets it
        self.weight = nn.Parameter(torch.empty(c2, c1 // g, *kernel))
        self.bias = nn.Parameter(torch.empty(c2))
        self.conv_offset_mask = offset_branch(c1, offset_groups, kernel, s, self.padding, d, separable, bound)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weight uniform within 1/sqrt(fan in), as nn.Conv2d; the rest zero."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
        self.weight.uniform_(-bound, bound)
        self.bias.zero_()
        start_at_zero(self.conv_offset_mask)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv_offset_mask(x)
        steps = self.stride, self.padding, self.dilation
        return deform_conv2d_raw(x, raw, self.weight, self.bias, *steps, self.backend, self.silu)

    def extra_repr(self) -> str:
        c2, c1, *kernel = self.weight.shape
        return f"{c1}, {c2}, kernel={tuple(kernel)}, stride={self.stride}, padding={self.padding}"


class DCNConv(nn.Module):
    """DCN -> bn -> act, in place of a Conv. Keys: conv.weight, conv.bias, conv.conv_offset_mask.*, bn.*

    ``conv.weight`` and ``bn.*`` have the names and shapes of a Conv's, so plain weights transfer by name.
    The arguments after ``act`` are those of :class:`DCN`.
    """

    def __init__(
        self,
        c1,
        c2,
        k=3,
        s=1,
        p=None,
        d=1,
        g=1,
        act: bool | nn.Module = True,
        offset_groups: int = 1,
        separable: bool = False,
        bound: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv = DCN(c1, c2, k, s, p, d, g, offset_groups, separable, bound)
        self.bn = batch_norm(c2)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Concat(nn.Module):
    """Join a list of maps along ``dimension`` (1: channels)."""

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.d = dimension

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(maps), self.d)


class Focus(nn.Module):
    """The four pixel phases as channels, then a Conv: (B, c1, H, W) -> (B, c2, H/2, W/2) at s = 1."""

    def __init__(self, c1, c2, k=1, s=1, p=None, g=1, act: bool | nn.Module = True) -> None:
        super().__init__()
        self.conv = Conv(c1 * 4, c2, k, s, p, g, act=act)

    def forward(self, x: Tensor) -> Tensor:
        phases = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.conv(torch.cat(phases, 1))


class SPP(nn.Module):
    """Spatial pyramid pooling (arXiv 1406.4729): the halved map beside its max pools of sizes k."""

    def __init__(self, c1, c2, k: Sequence[int] = (5, 9, 13), *, act: bool | nn.Module = True) -> None:
        super().__init__()
        h = c1 // 2
        self.cv1 = Conv(c1, h, act=act)
        self.cv2 = Conv(h * (len(k) + 1), c2, act=act)
        self.m = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


class SPPF(nn.Module):
    """SPP(5, 9, 13) by one pool of size k applied three times, which gives the same windows for less work."""

    def __init__(self, c1, c2, k: int = 5, *, act: bool | nn.Module = True) -> None:
        super().__init__()
        h = c1 // 2
        self.cv1 = Conv(c1, h, act=act)
        self.cv2 = Conv(h * 4, c2, act=act)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


class Bottleneck(nn.Module):
    """1x1 then 3x3 Conv, with the input added when ``shortcut`` and c1 = c2."""

    def __init__(self, c1, c2, shortcut=True, g=1, e=0.5, *, act: bool | nn.Module = True) -> None:
        super().__init__()
        h = int(c2 * e)
        self.cv1 = Conv(c1, h, act=act)
        self.cv2 = Conv(h, c2, 3, g=g, act=act)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class PartialBlock(nn.Module):
    """The frame of all C3 blocks: half of the channels through ``inner``, half around it, a 1x1 Conv to join.

    ``inner`` receives the hidden width and returns the module that keeps it.
    """

    def __init__(self, c1, c2, e, act: bool | nn.Module, inner: Callable[[int], nn.Module]) -> None:
        super().__init__()
        h = int(c2 * e)
        self.cv1 = Conv(c1, h, act=act)
        self.cv2 = Conv(c1, h, act=act)
        self.cv3 = Conv(2 * h, c2, act=act)
        self.m = inner(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C3(PartialBlock):
    """PartialBlock around n Bottlenecks."""

    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5, *, act: bool | nn.Module = True) -> None:
        def inner(h: int) -> nn.Module:
            return nn.Sequential(*(Bottleneck(h, h, shortcut, g, 1.0, act=act) for _ in range(n)))

        super().__init__(c1, c2, e, act, inner)


class DCNBottleneck(Bottleneck):
    """Bottleneck with a DCNConv as its 3x3; ``offsets``: DCNConv's arguments after ``act``."""

    def __init__(self, c1, c2, shortcut=True, g=1, e=0.5, *offsets, act: bool | nn.Module = True) -> None:
        super().__init__(c1, c2, shortcut, g, e, act=act)
        self.cv2 = DCNConv(int(c2 * e), c2, 3, 1, None, 1, g, act, *offsets)


class C3DCN(PartialBlock):
    """PartialBlock around n DCNBottlenecks. The arguments after ``e`` are those of :class:`DCN`."""

    def __init__(
        self,
        c1,
        c2,
        n=1,
        shortcut=True,
        g=1,
        e=0.5,
        offset_groups: int = 1,
        separable: bool = False,
        bound: float = 0.0,
        *,
        act: bool | nn.Module = True,
    ) -> None:
        offsets = offset_groups, separable, bound

        def inner(h: int) -> nn.Module:
            return nn.Sequential(*(DCNBottleneck(h, h, shortcut, g, 1.0, *offsets, act=act) for _ in range(n)))

        super().__init__(c1, c2, e, act, inner)
