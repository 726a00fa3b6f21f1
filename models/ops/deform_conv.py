"""Modulated deformable convolution (DCNv2, arXiv 1811.11168, eq. 1) as one function.

Blocks call :func:`deform_conv2d` and nothing else: the dtype policy, the guard against non-finite offsets and the
choice of a kernel live here. Today's kernel is torchvision's; another one joins at the last line of the function.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torchvision
from torch import Tensor

FAR = 1e6
"""Pixels. Offsets are cut to +-FAR, which is outside every image: a sample there is 0 and so are its gradients."""


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Convolve ``x`` at positions moved by ``offset`` and weighted by ``mask``.

    x (B, Cin, H, W); weight (Cout, Cin/G, kh, kw); bias (Cout,) or None. With K = kh*kw taps and OG offset groups:
    offset (B, 2*OG*K, H', W') in input pixels, a (y, x) pair per tap, groups outermost; mask (B, OG*K, H', W').
    G and OG are read off the shapes. Returns (B, Cout, H', W'), H' = floor((H + 2p - d(kh-1) - 1)/s) + 1.

    Tap (i, j) of output (h, w) reads x at (h*s - p + i*d + dy, w*s - p + j*d + dx), bilinear, zero outside.

    dtype: coordinates in half precision are wrong by whole pixels on large maps, so everything is computed in float32
    (float64 for float64 ``x``) with autocast off. The result has the autocast dtype when autocast is on for the
    device, else the dtype of ``x``.

    Non-finite input never faults: a NaN offset gives NaN in its output pixel (a loss check must see it), an infinite
    one samples outside the image, which is 0.

    Raises ValueError for shapes that do not belong together.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    _check_shapes(x, offset, mask, weight, bias, stride, padding, dilation)
    double = x.dtype == torch.float64
    compute = torch.float64 if double else torch.float32
    with _autocast_off(x.device.type):
        offset, mask = _guard(offset.to(compute), mask.to(compute))
        out = torchvision.ops.deform_conv2d(
            x.to(compute),
            offset,
            weight.to(compute),
            None if bias is None else bias.to(compute),
            stride=stride,
            padding=padding,
            dilation=dilation,
            mask=mask,
        )
    return out if double else out.to(_result_dtype(x))


def output_size(
    height: int,
    width: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """(H', W') of a convolution over an (H, W) map."""
    sizes = zip((height, width), kernel, stride, padding, dilation)
    rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    return rows, columns


def _guard(offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Finite offsets, and a mask that is NaN wherever an offset of its tap was.

    torchvision's CPU kernel reads out of bounds for a NaN coordinate and returns a NaN gradient for an infinite one.
    It multiplies the sample by the mask even when the sample is 0, so NaN travels through the mask. Elementwise
    only: nothing here waits for the device.
    """
    offset = offset.clamp(-FAR, FAR)  # keeps NaN
    pairs = offset.detach().unflatten(1, (mask.shape[1], 2))
    mask = mask + 0 * (pairs[:, :, 0] + pairs[:, :, 1])
    return offset.nan_to_num(nan=FAR), mask


def _autocast_off(device_type: str) -> AbstractContextManager:
    """Autocast disabled for the device; some device types (meta) know no autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _result_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` would return here."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _check_shapes(x, offset, mask, weight, bias, stride, padding, dilation) -> None:
    """One message naming what was given and what was expected; the kernel's own are about its internals."""
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"deform_conv2d: expected x (B, Cin, H, W) and weight (Cout, Cin/G, kh, kw), "
            f"got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    batch, c_in, height, width = x.shape
    c_out, c_group, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    if c_group == 0 or c_in % c_group or c_out % (c_in // c_group):
        raise ValueError(
            f"deform_conv2d: weight {tuple(weight.shape)} does not divide x {tuple(x.shape)} into groups: "
            f"expected weight (Cout, {c_in}/G, kh, kw) with G dividing {c_in} and Cout"
        )
    if offset.dim() != 4 or offset.shape[1] == 0 or offset.shape[1] % (2 * taps):
        raise ValueError(
            f"deform_conv2d: got offset {tuple(offset.shape)}, expected a multiple of {2 * taps} channels "
            f"(2 per tap of a {kernel[0]}x{kernel[1]} kernel)"
        )
    groups = offset.shape[1] // (2 * taps)
    if c_in % groups:
        raise ValueError(f"deform_conv2d: {groups} offset groups do not divide the {c_in} channels of x")
    rows, columns = output_size(height, width, kernel, stride, padding, dilation)
    expected = {
        "offset": (offset, (batch, 2 * groups * taps, rows, columns)),
        "mask": (mask, (batch, groups * taps, rows, columns)),
    }
    if bias is not None:
        expected["bias"] = (bias, (c_out,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"deform_conv2d: got {name} {tuple(tensor.shape)}, expected {shape} "
                f"for x {tuple(x.shape)} and weight {tuple(weight.shape)}"
            )
    if rows < 1 or columns < 1:
        raise ValueError(f"deform_conv2d: x {tuple(x.shape)} is smaller than the {kernel[0]}x{kernel[1]} kernel")
