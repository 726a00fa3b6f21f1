"""The models of the arms: a plain YOLOv5, its convolutions made deformable, the DCN layers wrapped to be studied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.collapse.arms import Arm
from models.common import C3, DCN, DCNConv
from models.deform import make_deformable, parse_requests
from models.ops.deform_conv import deform_conv2d_raw
from models.yolo import DetectionModel

SHIFT = 1 / 64
"""Pixels. The symmetric difference averages the operator over offsets moved by this much either way."""
FARTHEST = 30_000.0
"""Pixels, for coordinates in fp16: outside every image, and still finite when a coordinate is added."""

Watcher = Callable[["Studied", Tensor, Tensor, Tensor], None]


class Studied(nn.Module):
    """A DCN with what an arm changes about it. ``watcher``: called with (this, input, raw offsets and mask logits as
    they are used, output) when not None. ``dtype``: what conversions round to, None for none."""

    def __init__(self, dcn: DCN, arm: Arm, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dcn, self.arm, self.dtype = dcn, arm, dtype
        self.dcn.backend = arm.backend
        self.watcher: Watcher | None = None
        self.name = ""

    def forward(self, x: Tensor) -> Tensor:
        raw = self._bounded(self.dcn.conv_offset_mask(x))
        if self.arm.symmetric:
            moved = torch.zeros(raw.shape[1], 1, 1, device=raw.device)
            moved[: raw.shape[1] // 3 * 2] = SHIFT
            out = (self._convolve(x, raw + moved) + self._convolve(x, raw - moved)) / 2
        else:
            out = self._convolve(x, raw)
        if self.watcher is not None:
            self.watcher(self, x, raw, out)
        return out

    def _bounded(self, raw: Tensor) -> Tensor:
        limit = self.arm.bound
        if not limit:
            return raw
        pairs = raw.shape[1] // 3 * 2
        raw = raw.float()
        return torch.cat((limit * torch.tanh(raw[:, :pairs] / limit), raw[:, pairs:]), 1)

    def _convolve(self, x: Tensor, raw: Tensor) -> Tensor:
        dcn, how = self.dcn, self.arm.conversions
        steps = (dcn.stride, dcn.padding, dcn.dilation, dcn.backend)
        if how == "fp32":
            with torch.autocast(x.device.type, enabled=False):
                return deform_conv2d_raw(x.float(), raw.float(), dcn.weight, dcn.bias, *steps)
        if how == "coordinates":
            return self._in_half(x, raw)
        inputs = (x, raw, dcn.weight, dcn.bias)
        if how == "amp" or self.dtype is None:
            return deform_conv2d_raw(*inputs, *steps)
        out = deform_conv2d_raw(*(_rounded_gradient(t, self.dtype) for t in inputs), *steps)
        return out.to(self.dtype).to(out.dtype)  # the gradient too passes through both

    def _in_half(self, x: Tensor, raw: Tensor) -> Tensor:
        """torchvision's operator on half tensors; NaN offsets, which its CPU kernel does not survive, go far away."""
        import torchvision

        dcn, half = self.dcn, self.dtype or torch.float16
        pairs = raw.shape[1] // 3 * 2
        offset = raw[:, :pairs].float().nan_to_num(nan=FARTHEST).clamp(-FARTHEST, FARTHEST)
        tensors = [t.to(half) for t in (x, offset, dcn.weight, dcn.bias, raw[:, pairs:].float().sigmoid())]
        with torch.autocast(x.device.type, enabled=False):
            *rest, mask = tensors
            steps = dict(stride=dcn.stride, padding=dcn.padding, dilation=dcn.dilation)
            return torchvision.ops.deform_conv2d(*rest, mask=mask, **steps).to(x.dtype)


class _RoundedGradient(torch.autograd.Function):
    """Identity whose gradient is rounded to a narrower dtype on its way back, overflow to infinity included."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


def _rounded_gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _RoundedGradient.apply(x, dtype)


def build_model(arm: Arm, cfg: str | dict, nc: int, dtype: torch.dtype | None) -> DetectionModel:
    """The arm's model in float32 on the CPU. With the same torch seed all arms start from the same convolutions, a
    DCN from the one in whose place it is (their distributions are the same)."""
    model = DetectionModel(cfg, nc=nc)
    if arm.layers:
        make_deformable(model, parse_requests(arm.layers))
    for name, block in list(model.model.named_modules()):
        if isinstance(block, DCNConv):
            _study(block, name, arm, dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = arm.bn_eps
    return model.train()


@torch.no_grad()
def _study(block: DCNConv, name: str, arm: Arm, dtype: torch.dtype | None) -> None:
    dcn = block.conv
    if not arm.doubled:
        dcn.weight.mul_(0.5)
    bias = dcn.conv_offset_mask.bias
    bias[len(bias) // 3 * 2 :] = arm.mask_logit
    block.conv = Studied(dcn, arm, dtype)
    block.conv.name = name
    if not arm.norm:
        block.bn, block.act = nn.Identity(), nn.Identity()


def studied(model: DetectionModel) -> list[Studied]:
    """The DCN layers, first to last; their ``name`` is the path below ``model.model``."""
    return [module for module in model.modules() if isinstance(module, Studied)]


def next_norms(model: DetectionModel) -> dict[str, nn.Module]:
    """For each DCN layer without a norm of its own that stands before a C3: the 1x1 convolution whose output is the
    next to be normalised, by the layer's name."""
    found = {}
    for layer in studied(model):
        index = layer.name
        if not layer.arm.norm and index.isdigit() and isinstance(model.model[int(index) + 1], C3):
            found[index] = model.model[int(index) + 1].cv1.conv
    return found
