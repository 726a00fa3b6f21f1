"""Modulated deformable convolution (DCNv2, arXiv 1811.11168, eq. 1) as one function, and its choice of backend.

Blocks call :func:`deform_conv2d`, or :func:`deform_conv2d_raw` with the raw output of their offset convolution, and
nothing else: the dtype policy, the guard against non-finite offsets and the choice of a kernel live here.
``torchvision`` is the reference and runs everywhere; ``triton`` is the fused kernel of :mod:`models.ops.dcn_op`, and
``cuda`` the same with kernels in CUDA C++ for the backward of 3x3 layers in half precision.
"""

from __future__ import annotations

import importlib.util
import math
import os
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops import dcn_op, nvrtc
from models.ops.precision import at_least_float32

__all__ = ["BACKENDS", "backend_for", "deform_conv2d", "deform_conv2d_raw", "obstacle_to", "output_size"]

BACKENDS = ("auto", "cuda", "triton", "torchvision")
FAR = 1e6
"""Pixels. Offsets are cut to +-FAR, which is outside every image: a sample there is 0 and so are its gradients."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
HALF_DTYPES = (torch.float16, torch.bfloat16)
FUSED_DTYPES = (torch.float32, *HALF_DTYPES)
AUTOCAST_DEVICES = ("cuda", "cpu", "mps", "xpu")
"""Named, because torch.compile of torch 2.11 cannot trace the question whether a device has autocast; meta has not."""
LARGEST_IMAGE = 2**31 - 1
"""Elements: the fused kernels count within one image of a batch in 32 bits (and across images in 64)."""


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int | None = None,
    offset_groups: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve ``x`` at positions moved by ``offset`` and weighted by ``mask``.

    x (B, Cin, H, W); weight (Cout, Cin/G, kh, kw); bias (Cout,) or None. With K = kh*kw taps and OG offset groups:
    offset (B, 2*OG*K, H', W') in input pixels, a (y, x) pair per tap, groups outermost; mask (B, OG*K, H', W').
    G and OG are read off the shapes; given as ``groups`` and ``offset_groups`` they are checked. Returns
    (B, Cout, H', W'), H' = floor((H + 2p - d(kh-1) - 1)/s) + 1.

    Tap (i, j) of output (h, w) reads x at (h*s - p + i*d + dy, w*s - p + j*d + dx), bilinear, zero outside.

    dtype: coordinates in half precision are wrong by whole pixels on large maps, so they and all sums are float32
    (float64 for float64 ``x``). The result has the autocast dtype when autocast is on for the device, else the dtype
    of ``x``. ``torchvision`` computes everything in float32; ``triton`` multiplies in the result's dtype, as a
    convolution does, and keeps float32 offsets in float32.

    Non-finite input never faults: a NaN offset gives NaN in its output pixel (a loss check must see it), an infinite
    one samples outside the image, which is 0.

    ``backend``: see :func:`backend_for`. Raises ValueError for shapes that do not belong together and for a backend
    that cannot run there.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    _check_shapes(x, offset, mask, weight, bias, stride, padding, dilation)
    _check_groups(x, mask, weight, groups, offset_groups)
    chosen = _choose(x, weight, (offset, mask), backend)
    if chosen != "torchvision":
        raw = torch.cat([offset, mask.to(torch.promote_types(offset.dtype, mask.dtype))], 1)
        return _fused(x, raw, weight, bias, stride, padding, dilation, False, chosen)
    return _reference(x, offset, mask, weight, bias, stride, padding, dilation)


def deform_conv2d_raw(
    x: Tensor,
    raw: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    backend: str = "auto",
    silu: bool = False,
) -> Tensor:
    """:func:`deform_conv2d` of a layer's raw offset convolution: ``raw`` (B, 3*OG*K, H', W') holds 2*OG*K offsets, then
    OG*K mask logits, whose sigmoid (at least float32) is the mask. The fused kernel takes it as it is.

    ``silu``: apply SiLU to the result; the fused kernel does so before it writes, where no gradient is asked for."""
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    pairs = raw.shape[1] // 3 * 2
    offset, logits = raw[:, :pairs], raw[:, pairs:]
    _check_shapes(x, offset, logits, weight, bias, stride, padding, dilation)
    chosen = _choose(x, weight, (raw,), backend)
    if chosen == "torchvision":
        out = _reference(x, offset, at_least_float32(logits).sigmoid(), weight, bias, stride, padding, dilation)
    else:
        inputs = (x, raw, weight) if bias is None else (x, raw, weight, bias)
        inside = silu and not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))
        out = _fused(x, raw, weight, bias, stride, padding, dilation, True, chosen, inside)
        silu = silu and not inside
    return F.silu(out) if silu else out


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


def backend_for(device: torch.device | str, dtype: torch.dtype, backend: str = "auto") -> str:
    """``cuda``, ``triton`` or ``torchvision``: what runs for maps of ``dtype`` on ``device`` if asked for ``backend``.

    ``auto`` takes the first of them that can run: the fused ones on CUDA devices of compute capability 8.0 or newer.
    Raises ValueError, naming the reason, where ``cuda`` or ``triton`` is asked for and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"DCN backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    device = torch.device(device)
    if backend == "auto":
        return next((name for name in ("cuda", "triton") if not obstacle_to(name, device, dtype, False)), "torchvision")
    obstacle = obstacle_to(backend, device, dtype)
    if obstacle:
        raise ValueError(f"DCN backend {backend} cannot run here: {obstacle}")
    return backend


def obstacle_to(backend: str, device: torch.device, dtype: torch.dtype, explicit: bool = True) -> str | None:
    """Why ``backend`` cannot run for maps of ``dtype`` on ``device``, or None. ``explicit``: it was asked for by name,
    so that Triton's interpreter will do."""
    if backend == "torchvision":
        return None
    if not HAS_TRITON:
        return "the triton package is not installed"
    interpreted = explicit and os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU
    if device.type != "cuda" and not (interpreted and backend == "triton"):
        return f"it needs a CUDA device, not {device.type}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if dtype not in (HALF_DTYPES if backend == "cuda" else FUSED_DTYPES):
        return f"{str(dtype).removeprefix('torch.')} is not supported"
    return nvrtc.obstacle() if backend == "cuda" else None


def _choose(x: Tensor, weight: Tensor, rest: tuple[Tensor, ...], backend: str) -> str:
    """The backend for these tensors; an image too large for the fused kernel's counters goes to torchvision."""
    double = any(t.dtype == torch.float64 for t in (x, weight, *rest))
    chosen = backend_for(x.device, torch.float64 if double else _result_dtype(x), backend)
    if chosen != "torchvision" and _largest_image(x, weight, rest) > LARGEST_IMAGE:
        if backend == chosen:
            raise ValueError(f"DCN backend {chosen}: an image of {tuple(x.shape[1:])} has more than 2^31 elements")
        return "torchvision"
    return chosen


def _largest_image(x: Tensor, weight: Tensor, rest: tuple[Tensor, ...]) -> int:
    """Elements of one image of the largest map: input, offsets and mask, or output."""
    channels = max(sum(t.shape[1] for t in rest), weight.shape[0])
    return max(math.prod(x.shape[1:]), channels * math.prod(rest[0].shape[2:]))


def _fused(x, raw, weight, bias, stride, padding, dilation, logits: bool, backend: str, silu: bool = False) -> Tensor:
    """The registered operator, on x and weight in the result's dtype; offsets keep the precision they came in."""
    dtype = _result_dtype(x)
    taps = weight.shape[2] * weight.shape[3]
    offset_groups = raw.shape[1] // (3 * taps)
    return dcn_op.forward(
        x.to(dtype),
        raw,
        weight.to(dtype),
        bias,
        stride,
        padding,
        dilation,
        offset_groups,
        logits,
        backend == "cuda",
        silu,
    )


def _reference(x, offset, mask, weight, bias, stride, padding, dilation) -> Tensor:
    """torchvision's operator in float32 (float64 for float64 x), autocast off."""
    if not len(x) and not torch.is_grad_enabled():  # a model that is built asks for shapes only
        return x.new_empty(0, weight.shape[0], *offset.shape[2:], dtype=_result_dtype(x))
    import torchvision  # here: it takes as long to load as torch, and most models have no DCN

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
    """Autocast disabled for the device."""
    return torch.autocast(device_type, enabled=False) if device_type in AUTOCAST_DEVICES else nullcontext()


def _result_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` would return here."""
    device_type = x.device.type
    if device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _check_groups(x: Tensor, mask: Tensor, weight: Tensor, groups: int | None, offset_groups: int | None) -> None:
    """Group counts a caller gave against those of the shapes."""
    for name, given, actual in (
        ("groups", groups, x.shape[1] // weight.shape[1]),
        ("offset_groups", offset_groups, mask.shape[1] // (weight.shape[2] * weight.shape[3])),
    ):
        if given is not None and given != actual:
            raise ValueError(f"deform_conv2d: {name}={given}, but the shapes say {actual}")


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
