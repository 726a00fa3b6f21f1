"""deform_conv2d against plain loops in float64, its dtype policy, and input that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.deform_conv import deform_conv2d, output_size

# batch, c_in, c_out, size, kernel, stride, padding, dilation, groups, offset groups
CASES = {
    "asymmetric": (2, 6, 4, (7, 9), (3, 2), (2, 1), (1, 0), (2, 1), 2, 3),
    "article": (1, 3, 5, (6, 5), (3, 3), (2, 2), (1, 1), (1, 1), 1, 1),
    "pointwise": (2, 2, 3, (4, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1, 2),
    "wide": (1, 2, 2, (5, 1), (5, 1), (1, 1), (2, 0), (1, 1), 2, 1),
}


def make(case: str, spread: float = 1.5) -> tuple[list[Tensor], tuple]:
    """x, offset, mask, weight, bias in float64 and (stride, padding, dilation). Fractions of offsets stay away from 0
    and 1, where the derivative jumps."""
    batch, c_in, c_out, size, kernel, stride, padding, dilation, groups, offset_groups = CASES[case]
    g = torch.Generator().manual_seed(len(case))
    taps = math.prod(kernel)
    rows, columns = output_size(*size, kernel, stride, padding, dilation)
    x = torch.randn(batch, c_in, *size, generator=g, dtype=torch.float64)
    offset = torch.randn(batch, 2 * offset_groups * taps, rows, columns, generator=g, dtype=torch.float64) * spread
    offset = offset.floor() + 0.1 + 0.8 * torch.rand(offset.shape, generator=g, dtype=torch.float64)
    mask = torch.rand(batch, offset_groups * taps, rows, columns, generator=g, dtype=torch.float64)
    weight = torch.randn(c_out, c_in // groups, *kernel, generator=g, dtype=torch.float64)
    bias = torch.randn(c_out, generator=g, dtype=torch.float64)
    return [x, offset, mask, weight, bias], (stride, padding, dilation)


def bilinear(plane: Tensor, y: float, x: float) -> float:
    """One channel (H, W) at a place; 0 outside, fading over one pixel."""
    height, width = plane.shape
    if not (-1 < y < height and -1 < x < width):
        return 0.0
    top, left = math.floor(y), math.floor(x)
    total = 0.0
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                total += weight_y * weight_x * float(plane[row, column])
    return total


def slow(x, offset, mask, weight, bias, stride, padding, dilation) -> Tensor:
    """Equation 1 of arXiv 1811.11168, one number at a time."""
    batch, c_in, *size = x.shape
    c_out, c_group, *kernel = weight.shape
    taps = math.prod(kernel)
    per_group, per_offset = c_out // (c_in // c_group), c_in // (offset.shape[1] // (2 * taps))
    rows, columns = output_size(*size, kernel, stride, padding, dilation)
    out = torch.zeros(batch, c_out, rows, columns, dtype=torch.float64)
    for b in range(batch):
        for h in range(rows):
            for w in range(columns):
                for c in range(c_in):
                    for tap in range(taps):
                        at = (c // per_offset) * taps + tap
                        i, j = divmod(tap, kernel[1])
                        y = h * stride[0] - padding[0] + i * dilation[0] + float(offset[b, 2 * at, h, w])
                        z = w * stride[1] - padding[1] + j * dilation[1] + float(offset[b, 2 * at + 1, h, w])
                        value = float(mask[b, at, h, w]) * bilinear(x[b, c], y, z)
                        outs = slice(c // c_group * per_group, (c // c_group + 1) * per_group)
                        out[b, outs, h, w] += weight[outs, c % c_group, i, j] * value
    return out + bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("case", CASES)
def test_equals_loops(case: str) -> None:
    tensors, geometry = make(case)
    assert torch.allclose(deform_conv2d(*tensors, *geometry), slow(*tensors, *geometry), atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    tensors, geometry = make(case)
    tensors = [t[:1] if index < 3 else t for index, t in enumerate(tensors)]  # one image
    inputs = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: deform_conv2d(*t, *geometry), inputs, nondet_tol=1e-9, fast_mode=True)


def test_memory_layout_does_not_matter() -> None:
    tensors, geometry = make("asymmetric")
    expected = deform_conv2d(*tensors, *geometry)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
    ]
    for layout in layouts:
        assert torch.allclose(deform_conv2d(*[layout(t) for t in tensors], *geometry), expected, atol=1e-12)


def test_zero_offsets_and_full_mask_are_a_convolution() -> None:
    (x, offset, mask, weight, bias), (stride, padding, dilation) = make("asymmetric")
    y = deform_conv2d(x, offset * 0, mask * 0 + 1, weight, bias, stride, padding, dilation)
    assert torch.allclose(y, F.conv2d(x, weight, bias, stride, padding, dilation, groups=2), atol=1e-12)
    assert torch.allclose(
        deform_conv2d(x, offset * 0, mask * 0 + 1, weight, None, stride, padding, dilation) + bias.view(1, -1, 1, 1), y
    )


def test_empty_batch() -> None:
    tensors, geometry = make("article")
    inputs = [(t[:0] if index < 3 else t).clone().requires_grad_() for index, t in enumerate(tensors)]
    y = deform_conv2d(*inputs, *geometry)
    assert y.shape == (0, 5, 3, 3)
    y.sum().backward()
    assert torch.equal(inputs[3].grad, torch.zeros_like(inputs[3]))


# ---- precision


def large(height: int = 320) -> tuple[list[Tensor], Tensor]:
    """Inputs rounded to bfloat16, and the float64 answer for them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, height, 8, generator=g)
    offset = torch.randn(1, 18, height, 8, generator=g)
    mask = torch.rand(1, 9, height, 8, generator=g)
    weight, bias = torch.randn(4, 4, 3, 3, generator=g), torch.randn(4, generator=g)
    rounded = [t.bfloat16() for t in (x, offset, mask, weight, bias)]
    return rounded, deform_conv2d(*[t.double() for t in rounded], padding=1)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def test_half_precision_input_keeps_float32_coordinates() -> None:
    rounded, expected = large()
    y = deform_conv2d(*rounded, padding=1)
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 4e-3
    half = [t.half() for t in rounded]
    y = deform_conv2d(*half, padding=1)
    assert y.dtype == torch.float16 and relative(y, deform_conv2d(*[t.double() for t in half], padding=1)) < 5e-4


def test_autocast_gives_its_own_dtype_from_mixed_input() -> None:
    (x, offset, mask, weight, bias), expected = large()
    with torch.autocast("cpu", torch.bfloat16):
        y = deform_conv2d(x.float(), offset, mask.float(), weight.float(), bias.float(), padding=1)
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 4e-3
    assert deform_conv2d(x.float(), offset, mask, weight, bias, padding=1).dtype == torch.float32


# ---- input that is not finite


@pytest.mark.parametrize("channel", [0, 1, 17])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, -1e20])
def test_bad_offset_harms_its_own_pixel_only(channel: int, bad: float) -> None:
    tensors, geometry = make("article")
    clean = deform_conv2d(*tensors, *geometry)
    inputs = [t.clone() for t in tensors]
    inputs[1][0, channel, 1, 2] = bad
    inputs = [t.requires_grad_() for t in inputs]
    y = deform_conv2d(*inputs, *geometry)
    other = torch.ones(3, 3, dtype=torch.bool)
    other[1, 2] = False
    assert torch.equal(y[..., other], clean[..., other])
    y[..., other].sum().backward()
    if math.isnan(bad):  # as for a NaN pixel under a plain convolution, the weight's gradient is lost, loudly
        assert y[..., 1, 2].isnan().all()
        return
    without = [t.clone() for t in tensors]
    without[2][0, channel // 2, 1, 2] = 0
    assert torch.allclose(y[..., 1, 2], deform_conv2d(*without, *geometry)[..., 1, 2])
    assert all(t.grad.isfinite().all() for t in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_offsets_nan(dtype: torch.dtype) -> None:
    tensors, geometry = make("asymmetric")
    inputs = [t.to(dtype).requires_grad_() for t in tensors]
    y = deform_conv2d(inputs[0], inputs[1] * math.nan, *inputs[2:], *geometry)
    assert y.isnan().all()
    y.sum().backward()


def test_nan_in_the_other_inputs_propagates() -> None:
    for index in (0, 2, 3, 4):
        tensors, geometry = make("article")
        tensors[index][:] = math.nan
        assert deform_conv2d(*tensors, *geometry).isnan().any(), index


# ---- shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: (1, 17, 3, 3)}, r"got offset \(1, 17, 3, 3\), expected a multiple of 18 channels"),
        ({1: (1, 18, 3, 2)}, r"got offset \(1, 18, 3, 2\), expected \(1, 18, 3, 3\)"),
        ({1: (1, 36, 3, 3)}, "2 offset groups do not divide the 3 channels"),
        ({2: (1, 8, 3, 3)}, r"got mask \(1, 8, 3, 3\), expected \(1, 9, 3, 3\)"),
        ({2: (2, 9, 3, 3)}, r"got mask \(2, 9, 3, 3\)"),
        ({3: (5, 2, 3, 3)}, "does not divide"),
        ({4: (4,)}, r"got bias \(4,\), expected \(5,\)"),
        ({0: (3, 6, 5)}, r"expected x \(B, Cin, H, W\)"),
    ],
)
def test_wrong_shapes_say_what_was_expected(change: dict, message: str) -> None:
    tensors, geometry = make("article")
    for index, shape in change.items():
        tensors[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        deform_conv2d(*tensors, *geometry)


def test_runs_on_the_meta_device() -> None:
    tensors, geometry = make("article")
    assert deform_conv2d(*[t.to("meta") for t in tensors], *geometry).shape == (1, 5, 3, 3)
