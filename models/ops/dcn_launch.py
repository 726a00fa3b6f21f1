"""Launch the Triton kernels of the modulated deformable convolution: layouts, tile sizes and scratch memory.

Importing this module imports Triton; :mod:`models.ops.dcn_op` does so on first use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from models.ops import dcn_kernels as kernels
from models.ops.geometry import Geometry
from models.ops.layout import channels_last, empty_map, laid_out_as

SCRATCH_BYTES = 128 << 20
"""The float32 gradient of x is summed for so many images at a time that this much holds them. Measured: fewer at a time
(even few enough to stay in L2) is slower, since every launch ends with idle multiprocessors."""
BUSY = 264
"""Programs that keep a large GPU busy, two on each of 132 multiprocessors; with fewer, each tap has its own."""
FEWEST_SHARES = 3
"""Of the forward's taps. Two do not pay: 100 programs took 0.124 ms dealt out in two (TensorRT plugin), 0.098 whole."""
HOPPER_SHARED = 220 << 10
"""Bytes. The widest tiles need this much shared memory; A100 has 163 KB a program, RTX 30 and 40 have 99 KB."""
LEVELS = 2.0**62
"""Fixed point of the deterministic mode: the largest possible sum maps to this."""


def forward(
    x: Tensor, raw: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, silu: bool = False, tiles=None
) -> Tensor:
    """Output (B, N, H', W') in the dtype of x, channels last, through SiLU if ``silu``. x, raw (B, P, H', W') and
    weight (N, C/G, kh, kw) on one device, x and weight of one dtype."""
    out = empty_map(x, (x.shape[0], geometry.outputs, *raw.shape[2:]))
    if out.numel() == 0:
        return out
    tiles = tiles or forward_tiles(geometry, x.dtype, shared_memory(x.device))
    shares = forward_shares(x, raw, geometry, tiles)
    if shares == 1:
        launch_forward(kernels.forward, x, raw, pack(weight, geometry), bias, out, geometry, silu, tiles)
        return out
    parts = x.new_empty(x.shape[0], shares, *raw.shape[2:], geometry.outputs, dtype=torch.float32)
    launch_forward(kernels.forward, x, raw, pack(weight, geometry), None, parts, geometry, False, tiles, shares)
    total = parts.sum(1) if bias is None else parts.sum(1).add_(bias)
    return out.copy_((F.silu(total, inplace=True) if silu else total).permute(0, 3, 1, 2))


def pack(weight: Tensor, geometry: Geometry) -> Tensor:
    """weight (N, C/G, kh, kw) as :func:`launch_forward` reads it, (G, K, C/G, N/G)."""
    g = geometry.groups
    return weight.reshape(g, geometry.outputs // g, -1, geometry.taps).permute(0, 3, 2, 1).contiguous()


def forward_shares(x: Tensor, raw: Tensor, geometry: Geometry, tiles: dict) -> int:
    """How many programs deal out the taps of a patch among them: several where patches are too few for a large GPU."""
    programs = patch_count(x.shape[0], *raw.shape[2:], tiles) * forward_blocks(geometry, tiles) * geometry.groups
    shares = min(geometry.taps, BUSY // programs)
    return shares if shares >= FEWEST_SHARES else 1


def forward_blocks(geometry: Geometry, tiles: dict) -> int:
    """Programs that a group's outputs take for one patch."""
    return triton.cdiv(geometry.outputs // geometry.groups, tiles["BN0"] + tiles["BN1"])


def launch_forward(
    kernel, x, raw, packed, bias, out, geometry: Geometry, silu: bool = False, tiles=None, shares: int = 1
) -> None:
    """Fill ``out``. ``kernel``: ``dcn_kernels.forward``, or what stands for it while torch.export looks."""
    x, raw = channels_last(x), channels_last(raw)
    tiles = tiles or forward_tiles(geometry, x.dtype, shared_memory(x.device))
    height, width, rows, columns = *x.shape[2:], *raw.shape[2:]
    programs = patch_count(x.shape[0], rows, columns, tiles) * forward_blocks(geometry, tiles)
    kernel[(programs, geometry.groups, shares)](
        x, raw, packed, bias if bias is not None else packed, out, height, width, rows, columns,
        **constants(geometry), HAS_BIAS=bias is not None, SILU=silu, SHARES=shares, PRECISION=dot_precision(x.dtype),
        **tiles,
    )  # fmt: skip


def backward(
    grad: Tensor,
    x: Tensor,
    raw: Tensor,
    weight: Tensor,
    geometry: Geometry,
    need_x: bool,
    deterministic: bool,
    tiles=None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (empty unless need_x) and raw for the output's gradient ``grad``, each in its tensor's dtype.

    ``deterministic``: the sums into x's gradient are taken in 64-bit fixed point, so that their order is without
    consequence; otherwise by float32 atomics.
    """
    batch, _, height, width = x.shape
    rows, columns = raw.shape[2:]
    grad_x = empty_map(x, x.shape) if need_x else x.new_empty(0)
    grad_raw = empty_map(raw, raw.shape)
    if grad.numel() == 0:
        return grad_x.zero_(), grad_raw
    x, raw, grad = channels_last(x), channels_last(raw), channels_last(grad)
    g = geometry.groups
    packed = weight.reshape(g, geometry.outputs // g, -1, geometry.taps).permute(0, 3, 1, 2).contiguous()
    tiles = tiles or input_tiles(geometry, x.dtype, shared_memory(x.device))
    step = batch
    if need_x:
        kind = torch.int64 if deterministic else torch.float32
        step = max(1, min(batch, SCRATCH_BYTES // (kind.itemsize * x[0].numel())))
        scratch = torch.empty((step, height, width, geometry.channels), dtype=kind, device=x.device)
    else:
        scratch = grad_x
    scale = fixed_point(grad, raw, weight, geometry) if deterministic and need_x else scratch
    for first in range(0, batch, step):
        images = min(step, batch - first)
        if need_x:
            scratch.zero_()
        patches = patch_count(images, rows, columns, tiles)
        kernels.backward_input[(patches, 1 if patches >= BUSY else geometry.taps)](
            x, raw, packed, grad, scratch, grad_raw, scale, first, height, width, rows, columns,
            **constants(geometry), EXACT=deterministic and need_x, NEED_X=need_x, PRECISION=gradient_precision(x),
            **tiles,
        )  # fmt: skip
        if need_x:
            total = scratch[:images].permute(0, 3, 1, 2)
            grad_x[first : first + images] = total.double() / scale if deterministic else total
    return grad_x, grad_raw


def backward_weight(grad: Tensor, x: Tensor, raw: Tensor, weight: Tensor, geometry: Geometry, tiles=None) -> Tensor:
    """Gradient of weight, summed in float32 in an order that does not change from run to run."""
    if grad.numel() == 0:
        return torch.zeros_like(weight)
    batch, _, height, width = x.shape
    rows, columns = raw.shape[2:]
    x, raw, grad = channels_last(x), channels_last(raw), channels_last(grad)
    g, taps = geometry.groups, geometry.taps
    c_group, n_group = geometry.channels // g, geometry.outputs // g
    tiles = tiles or weight_tiles(geometry, x.dtype)
    patches = patch_count(batch, rows, columns, tiles)
    blocks = triton.cdiv(geometry.segment, tiles["BC"]) * (c_group // geometry.segment)
    blocks *= triton.cdiv(n_group, tiles["BN"]) * g * (taps // tiles["TAPS"])
    tiles = dict(tiles)
    splits = min(patches, max(1, round(tiles.pop("PROGRAMS") / blocks)))
    partial = torch.empty((splits, g, taps, n_group, c_group), dtype=torch.float32, device=x.device)
    kernels.backward_weight[(blocks, splits)](
        x, raw, grad, partial, patches, height, width, rows, columns,
        **constants(geometry), SPLITS=splits, PRECISION=gradient_precision(x), **tiles,
    )  # fmt: skip
    return laid_out_as(weight, partial.sum(0).permute(0, 2, 3, 1).reshape(weight.shape))


def constants(geometry: Geometry) -> dict[str, int]:
    """Those of Triton's kernels, which know groups and any kernel size."""
    return {
        **geometry.constants(), "G": geometry.groups, "OG": geometry.offset_groups, "KW": geometry.kernel[1],
        "K": geometry.taps, "P": 3 * geometry.taps * geometry.offset_groups, "CS": geometry.segment,
    }  # fmt: skip


def fixed_point(grad: Tensor, raw: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Levels per unit, float64 scalar on the device: so many that no sum into an element of x's gradient overflows.

    At most every tap of every output of the image lands on one element: |grad| * sum |w| over the outputs * |mask|.
    NaN or inf anywhere makes the scale NaN or 0 and the whole gradient NaN: loud, as it should be.
    """
    hits = geometry.taps * grad.shape[2] * grad.shape[3]
    largest = grad.abs().amax().double() * weight.abs().double().sum(0).amax()
    if not geometry.logits:
        masks = geometry.taps * geometry.offset_groups
        largest = largest * raw[:, 2 * masks : 3 * masks].abs().amax().double()
    return LEVELS / (hits * largest.clamp(min=1e-300))


def patch_count(batch: int, rows: int, columns: int, tiles: dict) -> int:
    return batch * triton.cdiv(columns, tiles["TW"]) * triton.cdiv(rows, tiles["BM"] // tiles["TW"])


def dot_precision(dtype: torch.dtype) -> str:
    """How a float32 product is taken: as torch's own switch for matrix products says (tf32 is off by default)."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def gradient_precision(x: Tensor) -> str:
    """The same for the backward, where three products of tf32, as exact as one of float32, are faster: up to 35 times
    where the latter's accumulators spill. Not so in the forward; and GPUs before Ampere have no tf32."""
    precision = dot_precision(x.dtype)
    three = precision == "ieee" and x.dtype == torch.float32 and x.is_cuda
    return "tf32x3" if three and torch.cuda.get_device_capability(x.device) >= (8, 0) else precision


def power(n: int, least: int, most: int) -> int:
    """The smallest power of two not below n, within [least, most]."""
    return min(most, max(least, triton.next_power_of_2(n)))


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; on the CPU (Triton's interpreter) those of a Hopper GPU."""
    if device.type != "cuda":
        return HOPPER_SHARED
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10)


def split_width(n: int, most: int) -> tuple[int, int]:
    """Two powers of two, of which the second may be 0, that cover n outputs with little waste, in several passes where
    n > 1.25 * most. 160 -> (128, 32), 640 -> (512, 128), 1280 -> twice (512, 128), 48 -> (32, 16), 100 -> (128, 0)."""
    n = triton.cdiv(n, triton.cdiv(n, most + most // 4))
    first = power(n // 2 + 1, 16, most)
    if first >= n:
        return first, 0
    rest = power(n - first, 16, most)
    return (first, rest) if rest < first else (2 * first, 0)


# The tables below were measured on an H100 in float16 (docs/performance.md); channels of 80, 160 and 320, stride 2.


def forward_tiles(geometry: Geometry, dtype: torch.dtype, shared: int) -> dict[str, int]:
    """``shared``: see :func:`shared_memory`."""
    half = dtype.itemsize == 2
    widest = 512 if shared >= HOPPER_SHARED else 256
    outputs = geometry.outputs // geometry.groups
    # float32 runs on the ordinary cores, where 64 + 16 outputs at a time are 4 to 20 % slower than 64 at a time
    first, second = (64, 0) if not half and outputs % 64 == 0 else split_width(outputs, widest if half else 64)
    return {
        "BM": 64, "TW": 8, "BC": 16 if geometry.segment <= 128 else 32, "BN0": first, "BN1": second,
        "num_warps": 8 if first > 256 else 4, "num_stages": 3 if half else 2,
    }  # fmt: skip


def input_tiles(geometry: Geometry, dtype: torch.dtype, shared: int) -> dict[str, int | bool]:
    """``shared``: see :func:`shared_memory`; the resident patch of grad lies there."""
    n, half, few = geometry.outputs // geometry.groups, dtype.itemsize == 2, geometry.segment <= 128
    first, second = split_width(n, 512 if half else 64)
    resident = geometry.groups == 1 and n <= first + second <= (640 if shared >= HOPPER_SHARED else 160)
    if not resident:
        first, second = power(n, 16, 64), 0
    large = first > 256
    return {
        "BM": 128 if large else 64, "TW": 8, "BC": power(geometry.segment, 16, 32 if few or not half else 64),
        "BN0": first, "BN1": second, "RESIDENT": resident,
        "num_warps": 8 if first >= 256 else 4, "num_stages": 1 if large else 3 if first == 256 else 2,
    }  # fmt: skip


def weight_tiles(geometry: Geometry, dtype: torch.dtype) -> dict[str, int]:
    n, half = geometry.outputs // geometry.groups, dtype.itemsize == 2
    narrow = n > 512  # several passes in any case
    return {
        "BM": 64 if narrow else 32, "TW": 8, "BC": power(geometry.segment, 16, 32),
        "BN": power(n, 16, 128 if narrow else 256 if half else 64), "TAPS": 3 if geometry.taps % 3 == 0 else 1,
        "PROGRAMS": 792, "num_warps": 8 if narrow else 4, "num_stages": 2,
    }  # fmt: skip
