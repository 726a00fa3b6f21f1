"""Activation functions that torch lacks, and the table of those a model YAML may name."""

from __future__ import annotations

import ast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Hardswish(nn.Module):
    """x * relu6(x + 3) / 6 (MobileNetV3, arXiv 1905.02244, sec. 5.2), written with ops every exporter knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardtanh(x + 3, 0.0, 6.0) / 6.0


class Mish(nn.Module):
    """x * tanh(softplus(x)) (arXiv 1908.08681)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * F.softplus(x).tanh()


class _MishFunction(torch.autograd.Function):
    """Mish that keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * F.softplus(x).tanh()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = F.softplus(x).tanh()
        return grad * (gate + x * torch.sigmoid(x) * (1 - gate * gate))


class MemoryEfficientMish(nn.Module):
    """Mish at half the activation memory: the intermediate values are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return _MishFunction.apply(x)


class FReLU(nn.Module):
    """max(x, BN(depthwise conv(x))), the funnel activation (arXiv 2007.11824, sec. 3.1). (B, c1, H, W) to the same."""

    def __init__(self, c1: int, k: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c1, k, 1, k // 2, groups=c1, bias=False)
        self.bn = nn.BatchNorm2d(c1, eps=1e-3, momentum=0.03)

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(x, self.bn(self.conv(x)))


class AconC(nn.Module):
    """(p1 - p2) x * sigmoid(beta (p1 - p2) x) + p2 x; p1, p2, beta learned per channel (arXiv 2009.04759, eq. 6)."""

    def __init__(self, c1: int) -> None:
        super().__init__()
        self.p1 = nn.Parameter(torch.randn(1, c1, 1, 1))
        self.p2 = nn.Parameter(torch.randn(1, c1, 1, 1))
        self.beta = nn.Parameter(torch.ones(1, c1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        difference = (self.p1 - self.p2) * x
        return difference * torch.sigmoid(self.beta * difference) + self.p2 * x


class MetaAconC(nn.Module):
    """ACON-C whose beta is computed from the map's mean by two 1x1 convolutions (arXiv 2009.04759, sec. 3.3)."""

    def __init__(self, c1: int, k: int = 1, s: int = 1, r: int = 16) -> None:
        super().__init__()
        hidden = max(r, c1 // r)
        self.p1 = nn.Parameter(torch.randn(1, c1, 1, 1))
        self.p2 = nn.Parameter(torch.randn(1, c1, 1, 1))
        self.fc1 = nn.Conv2d(c1, hidden, k, s, bias=True)
        self.fc2 = nn.Conv2d(hidden, c1, k, s, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        beta = torch.sigmoid(self.fc2(self.fc1(mean)))
        difference = (self.p1 - self.p2) * x
        return difference * torch.sigmoid(beta * difference) + self.p2 * x


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "LeakyReLU": nn.LeakyReLU,
    "ELU": nn.ELU,
    "GELU": nn.GELU,
    "Hardswish": nn.Hardswish,
    "Mish": nn.Mish,
    "MemoryEfficientMish": MemoryEfficientMish,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "Identity": nn.Identity,
}
"""What ``activation:`` may name. One instance serves a whole model, so only functions without channels are here."""


def activation_from_text(text: str) -> nn.Module:
    """``nn.LeakyReLU(0.1)`` -> the module. The name is looked up, the arguments are literals, nothing is evaluated.

    Raises ValueError, saying what was expected, for anything else.
    """
    known = ", ".join(f"nn.{name}" for name in ACTIVATIONS)
    try:
        call = ast.parse(text.strip(), mode="eval").body
        target = call.func if isinstance(call, ast.Call) else call
        name = ast.unparse(target).removeprefix("torch.").removeprefix("nn.")
        args = [ast.literal_eval(a) for a in call.args] if isinstance(call, ast.Call) else []
        kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords} if isinstance(call, ast.Call) else {}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"activation {text!r}: expected a name with literal arguments, like nn.LeakyReLU(0.1)"
        ) from None
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {text!r} is not one of {known}")
    try:
        return ACTIVATIONS[name](*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"activation {text!r}: {error}") from None
