"""DCN layers in the two forms that other runtimes understand, put into a copy of a model just before export.

``deformconv``: torchvision::deform_conv2d, which becomes ONNX DeformConv, OpenVINO's and ncnn's own layer.
``gridsample``: the same arithmetic from grid_sample and a 1x1 convolution, for runtimes without such an operator.
A third, ``fused``, is training's own kernel (deploy/fused_dcn.py), for AOTInductor on a GPU.

All sample in float32 whatever the model's dtype: a coordinate in half precision is wrong by up to an eighth of a pixel
on a 320-pixel map, which costs 1 to 3 % of the layer's output (docs/deploy.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import DCN

DCN_FORMS = ("deformconv", "gridsample")


class ExportDCN(nn.Module):
    """The forward of a DCN with its ``sampling`` in float32. (B, c1, H, W) -> (B, c2, H', W')."""

    def __init__(self, layer: DCN, sampling: nn.Module) -> None:
        super().__init__()
        self.conv_offset_mask, self.silu = layer.conv_offset_mask, layer.silu
        self.sampling = sampling

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv_offset_mask(x)
        pairs = raw.shape[1] // 3 * 2
        if x.dtype == torch.float32:
            out = self.sampling(x, raw[:, :pairs], raw[:, pairs:].sigmoid())
        else:
            raw = raw.float()
            out = self.sampling(x.float(), raw[:, :pairs], raw[:, pairs:].sigmoid()).to(x.dtype)
        return F.silu(out) if self.silu else out


def deform_conv(layer: DCN) -> nn.Module:
    """torchvision's module: one operator, and the form that pnnx knows."""
    import torchvision  # as in models/ops/deform_conv.py: a second, which models without DCN need not spend

    c_out, c_group, *kernel = layer.weight.shape
    c_in = layer.conv_offset_mask.in_channels
    steps = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    module = torchvision.ops.DeformConv2d(c_in, c_out, tuple(kernel), groups=c_in // c_group, **steps)
    module.weight, module.bias = layer.weight, layer.bias
    return module


class GridSampling(nn.Module):
    """grid_sample at K taps, stacked along the height, times the mask, then a 1x1 convolution over c1*K channels.

    Costs K times the input map in memory. grid_sample's zero padding is deform_conv2d's rule at the border.
    """

    def __init__(self, layer: DCN) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = map(_pair, (layer.stride, layer.padding, layer.dilation))
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """x (B, c1, H, W), offset (B, 2*G*K, H', W') in pixels, mask (B, G*K, H', W') -> (B, c2, H', W')."""
        rows, columns = offset.shape[2:]
        c_out, c_group, *kernel = self.weight.shape
        taps, c_in = kernel[0] * kernel[1], x.shape[1]
        share = c_in // (offset.shape[1] // (2 * taps))  # channels of an offset group, which samples for itself
        grid = self._grid(x, offset.reshape(-1, taps, 2, rows, columns))
        maps = x.reshape(-1, share, *x.shape[2:])
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        sampled = sampled.reshape(-1, share, taps, rows, columns) * mask.reshape(-1, 1, taps, rows, columns)
        weight = self.weight.reshape(c_out, c_group * taps, 1, 1)
        return F.conv2d(sampled.reshape(-1, c_in * taps, rows, columns), weight, self.bias, groups=c_in // c_group)

    def _grid(self, x: Tensor, offset: Tensor) -> Tensor:
        """offset (N, K, 2, H', W') -> (N, K*H', W', 2), x before y, in -1..1 over the input map."""
        height, width = x.shape[2:]
        rows, columns = offset.shape[3:]
        tap = torch.arange(offset.shape[1], device=x.device)
        y = self._regular(0, rows, tap // self.weight.shape[3]).unsqueeze(2) + offset[:, :, 0]
        x = self._regular(1, columns, tap % self.weight.shape[3]).unsqueeze(1) + offset[:, :, 1]
        grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)
        return grid.reshape(grid.shape[0], -1, columns, 2)

    def _regular(self, axis: int, count: int, tap: Tensor) -> Tensor:
        """(K, count): where taps at place ``tap`` (K,) of the kernel's axis read undeformed, in pixels of the input."""
        stride, padding, dilation = self.stride[axis], self.padding[axis], self.dilation[axis]
        place = torch.arange(count, device=tap.device, dtype=torch.float32) * stride - padding
        return place + (tap * dilation).float()[:, None]


def use_dcn_form(model: nn.Module, form: str) -> int:
    """Replace every DCN in ``model``, in place, by its ``form``, one of DCN_FORMS or ``fused``; weights are shared, not
    copied, but for ``fused``. Returns how many there were."""
    make = _maker(form)
    found = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DCN):
                setattr(parent, name, make(child))
                found += 1
    return found


def _maker(form: str) -> Callable[[DCN], nn.Module]:
    if form == "fused":
        from deploy.fused_dcn import FusedDCN  # here: it needs Triton

        return FusedDCN
    sampling = {"deformconv": deform_conv, "gridsample": GridSampling}[form]
    return lambda layer: ExportDCN(layer, sampling(layer))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
