"""The backward of the modulated deformable convolution with kernels in CUDA C++ (``cuda/``): 3x3, one group, float16 or
bfloat16, channels in sixteens. The forward, and every other layer, is Triton's (:mod:`models.ops.dcn_launch`).

The gradients of x, offsets and masks: one kernel, that multiplies by the weight itself or, from WIDE channels on,
leaves that to cuBLAS. The weight's gradient, from MANY channels on: the columns of some images at a time go into a
buffer, which cuBLAS multiplies; for fewer channels Triton's is as fast. docs/performance.md has the measurements.

``kernel`` arguments: :func:`models.ops.nvrtc.kernel`, or what stands for it in tests without a GPU.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from models.ops import nvrtc
from models.ops.geometry import Geometry
from models.ops.layout import as_rows, channels_last, empty_map, laid_out_as, product

TAPS, TILE = 9, 8
RAW_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
WIDE = 192
"""Channels from which on backward leaves its matrix product to cuBLAS."""
MANY = 80
"""Channels from which on backward_weight is faster than Triton's."""
SCRATCH_BYTES = 100 << 20
"""Holds float32 sums of x's gradient, and the columns' gradient beside them, for as many images as go in."""
COLUMN_BYTES = 96 << 20
RING = 3
"""Slots of cuda/backward_input.cu."""
LARGEST_IMAGE = 2**27 - 1
"""Pixels: a sample's place is kept in 28 bits."""
FUSED = {"CHANNELS": 16, "SPLIT": 1, "BLOCKS": 2, "FUSED": 1}
APART = {"CHANNELS": 64, "SPLIT": 2, "BLOCKS": 1, "FUSED": 0}
APART_SMALL = {"CHANNELS": 16, "SPLIT": 1, "BLOCKS": 1, "FUSED": 0}
"""Compile-time choices of cuda/backward_input.cu: 88 to 150 KB of shared memory, 123 KB, 66 KB (RTX GPUs have 99)."""


class Args(ctypes.Structure):
    """``Args`` of cuda/sample.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "raw", "weight", "grad", "out", "sums", "grad_raw", "state")),
        *((name, ctypes.c_int) for name in ("H", "W", "Ho", "Wo", "tiles", "images", "group")),
    ]


def suits(x: Tensor, weight: Tensor, offset_groups: int) -> bool:
    """Whether these kernels are made for such a layer."""
    outputs, channels, *kernel = weight.shape
    return (
        kernel == [3, 3]
        and channels == x.shape[1]
        and offset_groups == 1
        and x.dtype in (torch.float16, torch.bfloat16)
        and channels % 16 == 0
        and outputs % 16 == 0
        and x.shape[2] * x.shape[3] <= LARGEST_IMAGE
    )


def backward(
    grad: Tensor, x: Tensor, raw: Tensor, weight: Tensor, geometry: Geometry, need_x: bool,
    fused: bool | None = None, kernel=nvrtc.kernel,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x (empty unless need_x) and raw, each in its tensor's dtype. Sums into x's gradient are float32
    atomics: the last bits differ from run to run.

    ``fused``: whether the kernel multiplies by the weight itself; by default where that is faster and fits.
    """
    grad_x = empty_map(x, x.shape) if need_x else x.new_empty(0)
    grad_raw = empty_map(raw, raw.shape)
    if grad.numel() == 0:
        return grad_x.zero_(), grad_raw
    call, grad = _Call(x, raw, geometry, kernel), _readable(grad)
    common = {"HALO": 3, "NEED_X": int(need_x)}
    if fused is None:
        fused = geometry.channels < WIDE
    if fused:
        function = call.compile("backward_input", **common, **FUSED, RING=int(need_x))
        if function.fits:
            _backward_fused(call, function, grad, weight, grad_x, grad_raw)
            return grad_x, grad_raw
    for tiles in (APART, APART_SMALL):
        function = call.compile("backward_input", **common, **tiles, RING=0)
        if function.fits:
            _backward_apart(call, function, grad, weight, grad_x, grad_raw)
            return grad_x, grad_raw
    raise nvrtc.CudaKernelError("backward_input: this GPU has too little shared memory")


def _backward_fused(call: _Call, function, grad: Tensor, weight: Tensor, grad_x: Tensor, grad_raw: Tensor) -> None:
    """In one launch; the sums in a ring of groups of images."""
    x, everything, group = call.x, slice(0, len(call.x)), 0
    blocks = call.tiles(everything)
    given = {"grad": grad, "weight": pack_gradient(weight, FUSED["CHANNELS"]), "grad_raw": grad_raw}
    if grad_x.numel():
        group = max(1, min(math.ceil(len(x) / RING), SCRATCH_BYTES // (RING * 4 * x[0].numel())))
        groups = math.ceil(len(x) / group)
        given["sums"] = x.new_zeros(min(RING, groups) * group * x[0].numel(), dtype=torch.float32)
        given["state"] = x.new_zeros(1 + 2 * groups, dtype=torch.int32)
        given["out"] = grad_x
        blocks += call.tiles(slice(0, 2 * group))  # they turn the last two groups
    call.launch(function, (blocks, 1), everything, group=group, **given)


def _backward_apart(call: _Call, function, grad: Tensor, weight: Tensor, grad_x: Tensor, grad_raw: Tensor) -> None:
    """Some images at a time: cuBLAS makes the columns' gradient, the kernel does the rest."""
    x, need_x, matrix = call.x, grad_x.numel() > 0, _matrix(weight)
    for images, pixels in call.portions(SCRATCH_BYTES, 4 * need_x * x[0].numel() + call.column_bytes()):
        columns = torch.mm(as_rows(grad)[pixels], matrix)
        sums = x.new_zeros((images.stop - images.start, *x.shape[2:], x.shape[1]) if need_x else 0, dtype=torch.float32)
        call.launch(function, (call.tiles(images), 1), images, grad=columns, sums=sums, grad_raw=grad_raw[images])
        if need_x:
            grad_x[images] = sums.permute(0, 3, 1, 2)


def backward_weight(
    grad: Tensor, x: Tensor, raw: Tensor, weight: Tensor, geometry: Geometry, kernel=nvrtc.kernel
) -> Tensor:
    """Gradient of weight, summed in float32 in an order that does not change from run to run."""
    if grad.numel() == 0:
        return torch.zeros_like(weight)
    call, grad = _Call(x, raw, geometry, kernel), _readable(grad)
    n, c = geometry.outputs, geometry.channels
    total = 0.0
    for pixels, columns in _columns(call):
        total = total + product(as_rows(grad)[pixels].t(), columns)
    return laid_out_as(weight, total.reshape(n, TAPS, c).permute(0, 2, 1).reshape(weight.shape))


class _Call:
    """One layer's tensors, channels last, and the kernels for it."""

    def __init__(self, x: Tensor, raw: Tensor, geometry: Geometry, kernel) -> None:
        self.x, self.raw, self.geometry, self.kernel = _readable(x), _readable(raw), geometry, kernel

    def compile(self, source: str, **constants: int):
        kinds = {"RAW": RAW_CODES[self.raw.dtype], "BF16": int(self.x.dtype == torch.bfloat16)}
        return self.kernel(source, {**self.geometry.constants(), **kinds, **constants}, self.x.device)

    def tiles(self, images: slice) -> int:
        return (images.stop - images.start) * math.prod(math.ceil(side / TILE) for side in self.raw.shape[2:])

    def launch(self, function, grid: tuple[int, int], images: slice, group: int = 0, **tensors: Tensor) -> None:
        tensors = {"x": self.x[images], "raw": self.raw[images], **tensors}
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        sizes = dict(zip(("H", "W", "Ho", "Wo"), (*self.x.shape[2:], *self.raw.shape[2:])))
        function.launch(
            grid,
            Args(**pointers, **sizes, tiles=self.tiles(images), images=images.stop - images.start, group=group),
            self.x.device,
        )

    def column_bytes(self) -> int:
        """Of one image."""
        return TAPS * self.x.shape[1] * math.prod(self.raw.shape[2:]) * self.x.element_size()

    def portions(self, limit: int, image_bytes: int) -> Iterator[tuple[slice, slice]]:
        """(images, pixels of their outputs), for all images: as few and as even portions as ``limit`` bytes allow."""
        batch, pixels = len(self.x), math.prod(self.raw.shape[2:])
        most = max(1, limit // max(1, image_bytes))
        step = math.ceil(batch / math.ceil(batch / most))
        for first in range(0, batch, step):
            last = min(first + step, batch)
            yield slice(first, last), slice(first * pixels, last * pixels)


def column_tiles(channels: int) -> dict[str, int]:
    """Compile-time choices of cuda/columns.cu."""
    return {"CHANNELS": 32 if channels % 64 else 64, "THREADS": 256, "BLOCKS": 4}


def _columns(call: _Call) -> Iterator[tuple[slice, Tensor]]:
    """(pixels, columns (pixels, 9 * C)) of some images at a time, for all."""
    channels = call.x.shape[1]
    tiles = column_tiles(channels)
    function = call.compile("columns", **tiles)
    for images, pixels in call.portions(COLUMN_BYTES, call.column_bytes()):
        columns = call.x.new_empty(pixels.stop - pixels.start, TAPS * channels)
        call.launch(function, (call.tiles(images), math.ceil(channels / tiles["CHANNELS"])), images, out=columns)
        yield pixels, columns


def _readable(maps: Tensor) -> Tensor:
    """Channels last, at an address that 16 bytes can be read from: a view into a buffer may begin anywhere."""
    maps = channels_last(maps)
    return maps.clone() if maps.data_ptr() % 16 else maps


def _matrix(weight: Tensor) -> Tensor:
    """(N, 9 * C), taps outermost, as the columns have them."""
    return weight.flatten(2).transpose(1, 2).reshape(weight.shape[0], -1)


def pack_gradient(weight: Tensor, channels: int) -> Tensor:
    """weight (N, C, 3, 3) in the order in which tensor cores take the right matrix of grad . weight: for a tap, 8
    channels of a step of ``channels``, 16 outputs and a lane, its four numbers. C is filled up with zeros."""
    n, c = weight.shape[:2]
    padded = weight.new_zeros(n, math.ceil(c / channels) * channels, TAPS)
    padded[:, :c] = weight.flatten(2)
    # (sixteens, half, pair, one of two) outputs, (eights, 8) channels, taps
    return padded.reshape(n // 16, 2, 4, 2, -1, 8, TAPS).permute(6, 4, 0, 5, 2, 1, 3).contiguous()
