"""DCN layers as the fused Triton kernel of training, in a form that torch.export looks into.

``dcn::forward`` of models/ops/dcn_op.py is opaque, as an operator that has a gradient must be: a package that called it
would need Python. ``dcn::packed`` shows its kernel, so that AOTInductor compiles it and puts the machine code into the
package. Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.common import DCN
from models.ops import dcn_kernels, dcn_launch
from models.ops.geometry import Geometry, pair
from models.ops.layout import empty_map


@torch.library.triton_op("dcn::packed", mutates_args=())
def packed(
    x: Tensor,
    raw: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_groups: int,
    silu: bool,
) -> Tensor:
    """(B, N, H', W') in the dtype of x, channels last. x (B, C, H, W) and weight (G*K, C/G, N/G) of one dtype; bias
    (N,); raw (B, 3*K*OG, H', W') as it comes from the offset convolution: offsets, then mask logits."""
    groups, outputs = x.shape[1] // weight.shape[1], weight.shape[2]
    pairs = [(pair[0], pair[1]) for pair in (stride, padding, dilation, kernel)]
    geometry = Geometry(*pairs, x.shape[1], outputs * groups, groups, offset_groups, True)
    out = empty_map(x, (x.shape[0], geometry.outputs, *raw.shape[2:]))
    forward = torch.library.wrap_triton(dcn_kernels.forward)
    dcn_launch.launch_forward(forward, x, raw, weight, bias, out, geometry, silu)
    return out


class FusedDCN(nn.Module):
    """The forward of a DCN by one kernel, with coordinates and sums in float32. (B, c1, H, W) -> (B, c2, H', W').

    The weight is packed once, here, and not at every call."""

    def __init__(self, layer: DCN) -> None:
        super().__init__()
        self.conv_offset_mask, self.silu = layer.conv_offset_mask, layer.silu
        self.offset_groups, self.kernel = layer.offset_groups, list(layer.weight.shape[2:])
        self.steps = [list(pair(each)) for each in (layer.stride, layer.padding, layer.dilation)]
        x = layer.weight.new_empty(0, layer.conv_offset_mask.in_channels, 1, 1)
        geometry = Geometry.of(x, layer.weight, *self.steps, self.offset_groups, True)
        # three dimensions: .to(memory_format=) of the model would lay out four anew
        weight = dcn_launch.pack(layer.weight.detach(), geometry).flatten(0, 1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv_offset_mask(x)
        return packed(x, raw, self.weight, self.bias, self.kernel, *self.steps, self.offset_groups, self.silu)
