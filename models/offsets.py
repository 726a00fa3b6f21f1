"""The convolutions inside a DCN layer that say where it samples, beyond the plain one of the article."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Size = int | tuple[int, int]


class BoundedOffsets(nn.Conv2d):
    """A convolution whose offsets stay within ``bound`` pixels: bound * tanh(raw / bound). The mask logits are left
    as they are, and so are the names and shapes in the state dict."""

    bound = math.inf

    def forward(self, x: Tensor) -> Tensor:
        return bounded(super().forward(x), self.bound)


class SeparableOffsets(nn.Module):
    """A depthwise kh x kw convolution, then a 1x1 one: c1 * (K + 3*K*G) weights instead of c1 * K * 3*K*G.

    Its attributes are those of the convolution it stands for. ``bound``: as in :class:`BoundedOffsets`.
    """

    def __init__(self, c1: int, c2: int, k: Size, s: Size, p: Size, d: Size, bound: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c1, c1, k, s, p, d, groups=c1, bias=False)
        self.pointwise = nn.Conv2d(c1, c2, 1)
        self.in_channels, self.bound = c1, bound
        self.kernel_size, self.stride = self.depthwise.kernel_size, self.depthwise.stride
        self.padding, self.dilation = self.depthwise.padding, self.depthwise.dilation

    def forward(self, x: Tensor) -> Tensor:
        return bounded(self.pointwise(self.depthwise(x)), self.bound)


def offset_branch(
    c1: int, offset_groups: int, k: tuple[int, int], s: Size, p: Size, d: Size, separable: bool, bound: float
) -> nn.Module:
    """c1 channels -> 3*K*G of raw offsets and mask logits. ``bound``: in pixels, 0 for none."""
    if isinstance(bound, bool) or not (isinstance(bound, (int, float)) and 0 <= bound < math.inf):
        raise ValueError(f"bound = {bound!r}: a number of pixels, 0 for none")
    if not isinstance(separable, bool):
        raise ValueError(f"separable = {separable!r}: True or False")
    channels, reach = 3 * math.prod(k) * offset_groups, bound or math.inf
    if separable:
        return SeparableOffsets(c1, channels, k, s, p, d, reach)
    if not bound:
        return nn.Conv2d(c1, channels, k, s, p, d)
    branch = BoundedOffsets(c1, channels, k, s, p, d)
    branch.bound = reach
    return branch


@torch.no_grad()
def start_at_zero(branch: nn.Module) -> None:
    """Make what an offset branch gives zero, whatever it reads."""
    last = branch.pointwise if isinstance(branch, SeparableOffsets) else branch
    last.weight.zero_()
    last.bias.zero_()


def bounded(raw: Tensor, bound: float) -> Tensor:
    """``raw`` (B, 3*K*G, H', W') with its first two thirds, the offsets, within ``bound`` pixels; inf leaves them."""
    if math.isinf(bound):
        return raw
    pairs = raw.shape[1] // 3 * 2
    return torch.cat((bound * torch.tanh(raw[:, :pairs] / bound), raw[:, pairs:]), 1)
