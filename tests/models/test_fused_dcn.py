"""The fused (Triton) deformable convolution against float64: on a GPU, or on the CPU through Triton's interpreter."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.common import DCN
from models.ops import deform_conv, nvrtc
from models.ops.deform_conv import backend_for, deform_conv2d, deform_conv2d_raw, output_size
from tests.models.test_deform_conv import CASES, make, relative, slow

ROOT = Path(__file__).resolve().parents[2]
HAS_CUDA = torch.cuda.is_available()
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(HAS_CUDA, reason="kernels of one process are compiled or interpreted")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernels run in Triton's interpreter, which tests/conftest.py chose at their import."""
    if not HAS_CUDA:
        pytest.importorskip("triton", reason="Triton has no package for this platform")
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def fused(*args, **kwargs) -> Tensor:
    return deform_conv2d(*args, **kwargs, backend="triton")


def agree(tensors: list[Tensor], geometry: tuple, device: str, dtype: torch.dtype, limit: float, layout=None) -> list:
    """Output and all gradients of the fused op on ``tensors`` rounded to dtype, against float64 on the same numbers.
    Empty and all-zero expectations must be met exactly. Returns them."""
    rounded = [None if t is None else t.to(dtype) for t in tensors]
    exact = [None if t is None else t.double().requires_grad_() for t in rounded]
    expected = deform_conv2d(*exact, *geometry, backend="torchvision")
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    inputs = [None if t is None else t.to(device) for t in rounded]
    if layout:
        inputs = [layout(t) if t is not None and t.dim() == 4 else t for t in inputs]
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    got = fused(*inputs, *geometry)
    assert got.dtype == dtype and got.shape == expected.shape
    expected.backward(g.double())
    got.backward(g.to(device))
    pairs = [(got.detach(), expected.detach())]
    pairs += [(t.grad, e.grad) for t, e in zip(inputs, exact) if t is not None]
    for index, (ours, reference) in enumerate(pairs):
        error = float((ours.cpu().double() - reference).norm())
        assert error <= limit * float(reference.norm()), (index, error, float(reference.norm()))
    return [ours for ours, _ in pairs]


@pytest.fixture(params=[1, 264], ids=["together", "dealt out"])
def taps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few patches each tap has its own program; with BUSY = 1 these small maps are many."""
    from models.ops import dcn_launch

    monkeypatch.setattr(dcn_launch, "BUSY", request.param)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("taps")
def test_equals_float64(case: str, device: str) -> None:
    tensors, geometry = make(case)
    assert relative(fused(*[t.float().to(device) for t in tensors], *geometry).cpu(), slow(*tensors, *geometry)) < 1e-6
    agree(tensors, geometry, device, torch.float32, 1e-6)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision(dtype: torch.dtype, limit: float, device: str) -> None:
    """Limits: twice the unit roundoff (2^-11, 2^-8), for the column and the result are each rounded once."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")
    agree(*make("asymmetric"), device, dtype, limit)
    agree(*make("article"), device, dtype, limit)


def test_half_precision_keeps_float32_coordinates(device: str) -> None:
    """Row 900 in float16 has steps of half a pixel."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 1000, 2, generator=g).half()
    offset = (torch.rand(1, 2, 1000, 2, generator=g) * 0.8 + 0.1).half()
    weight, mask = torch.randn(2, 2, 1, 1, generator=g).half(), torch.ones(1, 1, 1000, 2).half()
    expected = deform_conv2d(*[t.double() for t in (x, offset, mask, weight)])
    got = fused(*[t.to(device) for t in (x, offset, mask, weight)])
    assert relative(got.cpu(), expected) < 1e-3


def test_fractions_keep_their_digits_far_from_the_first_pixel(device: str) -> None:
    """Row 2000 in float32 has steps of 1e-4, so that a sum of coordinate and offset loses what this does not."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 2, 2048, 3, generator=g), torch.randn(3, 2, 3, 3, generator=g)
    offset, mask = torch.randn(1, 18, 16, 3, generator=g) * 1.5, torch.rand(1, 9, 16, 3, generator=g)
    tensors, geometry = [x, offset, mask, weight, None], ((128, 1), (1, 1), (1, 1))
    agree(tensors, geometry, device, torch.float32, 1e-6)
    exact = [None if t is None else t.double() for t in tensors]
    theirs, expected = (deform_conv2d(*each, *geometry, backend="torchvision") for each in (tensors, exact))
    assert relative(theirs, expected) > 1e-5


@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_any_shape(device: str, data: st.DataObject) -> None:
    draw = data.draw
    groups, offset_groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    c_in = groups * offset_groups * draw(st.sampled_from([1, 3]))
    c_out = groups * draw(st.sampled_from([1, 5]))
    kernel, stride, padding, dilation = (
        (draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 3), (1, 3), (0, 2), (1, 2))
    )
    size = tuple(draw(st.integers(d * (k - 1) + 1, 9)) for d, k in zip(dilation, kernel))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    batch, taps, out = draw(st.integers(0, 2)), math.prod(kernel), output_size(*size, kernel, stride, padding, dilation)
    offset = torch.randn(batch, 2 * offset_groups * taps, *out, generator=g) * draw(st.sampled_from([0.5, 4.0]))
    offset = offset.floor() + 0.1 + 0.8 * torch.rand(offset.shape, generator=g)
    tensors = [
        torch.randn(batch, c_in, *size, generator=g),
        offset,
        torch.rand(batch, offset_groups * taps, *out, generator=g),
        torch.randn(c_out, c_in // groups, *kernel, generator=g),
        draw(st.sampled_from([None, torch.randn(c_out, generator=g)])),
    ]
    agree(tensors, (stride, padding, dilation), device, torch.float32, 1e-5)


@pytest.mark.usefixtures("taps")
def test_more_than_one_tile_of_everything(device: str) -> None:
    """Blocks of outputs, channels and pixels that overlap the edges; 20 channels are no power of two."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 20, 13, 11, generator=g), torch.randn(90, 20, 3, 3, generator=g)
    offset = torch.randn(1, 18, 13, 11, generator=g).floor() + 0.25
    tensors = [x, offset, torch.rand(1, 9, 13, 11, generator=g), weight, torch.randn(90, generator=g)]
    agree(tensors, (1, 1, 1), device, torch.float32, 1e-6)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t.flip(1).flip(1),
    ],
)
def test_memory_layout_does_not_matter(layout, device: str) -> None:
    agree(*make("asymmetric"), device, torch.float32, 1e-6, layout)


def test_result_is_channels_last(device: str) -> None:
    tensors, geometry = make("asymmetric")
    x = tensors[0].float().to(device).requires_grad_()
    y = fused(x, *[t.float().to(device) for t in tensors[1:]], *geometry)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last) or x.grad.is_contiguous()


# ---- the sampling rule


@pytest.mark.parametrize(
    ("y", "value", "slope"),
    [
        (-2, 0, 0),
        (-1.0001, 0, 0),
        (-1, 0, 1),
        (-0.5, 0.5, 1),
        (0, 1, 0),
        (2.25, 1, 0),
        (4, 1, -1),
        (4.75, 0.25, -1),
        (5, 0, 0),
        (5.5, 0, 0),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_border(y: float, value: float, slope: float, axis: int, device: str) -> None:
    """Image of ones, 5 pixels long: the fade to zero over one pixel, and one-sided slopes at the kinks."""
    offset = torch.zeros(1, 2, 1, 1)
    offset[0, axis], offset[0, 1 - axis] = y, 2
    offset = offset.to(device).requires_grad_()
    x, one = torch.ones(1, 1, 5, 5, device=device), torch.ones(1, 1, 1, 1, device=device)
    out = fused(x, offset, one, one, None, 5)
    out.sum().backward()
    assert out.item() == pytest.approx(value, abs=1e-6)
    assert offset.grad[0, axis].item() == pytest.approx(slope, abs=1e-6)


def test_integer_offsets_are_a_shifted_convolution(device: str) -> None:
    (x, offset, mask, weight, bias), geometry = make("article")
    x, weight, bias = (t.float().to(device) for t in (x, weight, bias))
    one, zero = torch.ones_like(mask).float().to(device), torch.zeros_like(offset).float().to(device)
    plain = F.conv2d(x, weight, bias, 2, 1)
    assert torch.allclose(fused(x, zero, one, weight, bias, *geometry), plain, atol=1e-5)
    shifted = F.conv2d(F.pad(x, (0, 0, 0, 2))[:, :, 2:], weight, bias, 2, 1)
    down = zero.clone()
    down[:, ::2] = 2
    inner = slice(1, 2)  # elsewhere the shifted image's padding differs
    got = fused(x, down, one, weight, bias, *geometry)
    assert torch.allclose(got[:, :, inner, inner], shifted[:, :, inner, inner], atol=1e-5)


@pytest.mark.parametrize("channel", [0, 17])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 1e6])
def test_bad_offset_harms_its_own_pixel_only(channel: int, bad: float, device: str) -> None:
    tensors, geometry = make("article")
    tensors = [t.float().to(device) for t in tensors]
    clean = fused(*tensors, *geometry)
    inputs = [t.clone() for t in tensors]
    inputs[1][0, channel, 1, 2] = bad
    inputs = [t.requires_grad_() for t in inputs]
    y = fused(*inputs, *geometry)
    other = torch.ones(3, 3, dtype=torch.bool)
    other[1, 2] = False
    assert torch.equal(y[..., other], clean[..., other])
    y.sum().backward()
    if math.isnan(bad):
        assert y[..., 1, 2].isnan().all() and inputs[1].grad[0, channel, 1, 2].isnan()
        return
    without = [t.clone() for t in tensors]
    without[2][0, channel // 2, 1, 2] = 0
    assert torch.allclose(y[..., 1, 2], fused(*without, *geometry)[..., 1, 2], atol=1e-6)
    assert all(t.grad.isfinite().all() for t in inputs) and inputs[1].grad[0, channel, 1, 2] == 0


def test_a_pixel_that_is_not_read_harms_nothing(device: str) -> None:
    """Corners outside are 0, not 0 times the pixel at the border."""
    x = torch.zeros(1, 1, 4, 4, device=device)
    x[0, 0, 0, 0] = math.nan
    offset, one = torch.full((1, 2, 1, 1), -50.0, device=device), torch.ones(1, 1, 1, 1, device=device)
    assert fused(x, offset, one, one, None, 4).item() == 0


# ---- determinism


def test_deterministic_mode_agrees_and_repeats(device: str, deterministic: None) -> None:
    first, second = (agree(*make("asymmetric"), device, torch.float32, 1e-6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_deterministic_mode_has_the_range_of_float32(size: float, device: str, deterministic: None) -> None:
    tensors, geometry = make("article")
    inputs = [t.float().to(device).requires_grad_() for t in tensors]
    y = fused(*inputs, *geometry)
    (g,) = torch.autograd.grad(y, inputs[0], torch.full_like(y, size))
    exact = [t.requires_grad_() for t in tensors]
    y = deform_conv2d(*exact, *geometry)
    (e,) = torch.autograd.grad(y, exact[0], torch.full_like(y, size))
    assert relative(g.cpu(), e) < 1e-6


def test_deterministic_mode_shows_nan(device: str, deterministic: None) -> None:
    tensors, geometry = make("article")
    x = tensors[0].float().to(device).requires_grad_()
    y = fused(x, *[t.float().to(device) for t in tensors[1:]], *geometry)
    g = torch.ones_like(y)
    g[0, 0, 1, 1] = math.nan
    y.backward(g)
    assert x.grad.isnan().any()


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- torch around it


def raw_inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple]:
    """x, raw (offsets, logits), weight, bias requiring gradients."""
    (x, offset, mask, weight, bias), geometry = make("article")
    raw = torch.cat([offset, mask.logit()], 1)
    return [t.to(device, dtype).requires_grad_() for t in (x, raw, weight, bias)], geometry


def test_raw_form_takes_the_sigmoid_itself(device: str) -> None:
    (x, raw, weight, bias), geometry = raw_inputs(device)
    y = deform_conv2d_raw(x, raw, weight, bias, *geometry, backend="triton")
    expected = deform_conv2d_raw(x, raw, weight, bias, *geometry, backend="torchvision")
    assert relative(y.detach(), expected.detach().double()) < 1e-6
    g = torch.randn_like(y)
    got, want = (torch.autograd.grad(out, (x, raw, weight, bias), g) for out in (y, expected))
    assert all(relative(a, b.double()) < 1e-6 for a, b in zip(got, want))


def test_opcheck(device: str) -> None:
    (x, raw, weight, bias), geometry = raw_inputs(device)
    pairs = [list(p) if isinstance(p, tuple) else [p, p] for p in geometry]
    torch.library.opcheck(torch.ops.dcn.forward.default, (x, raw, weight, bias, *pairs, 1, True, False, False))
    torch.library.opcheck(torch.ops.dcn.forward.default, (x, raw, weight, None, *pairs, 1, False, True, False))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_gradients_are_as_compilers_are_told(device: str, channels_last: bool) -> None:
    """Shapes, dtypes and strides of what the operator returns and of what it says that it will."""
    (x, raw, weight, _), geometry = raw_inputs(device)
    if channels_last:
        x, raw, weight = (t.to(memory_format=torch.channels_last) for t in (x, raw, weight))
    x, raw, weight = (t.detach() for t in (x, raw, weight))
    grad = torch.randn(x.shape[0], weight.shape[0], *raw.shape[2:], device=device)
    pairs = [list(p) if isinstance(p, tuple) else [p, p] for p in geometry]
    backward = torch.ops.dcn.backward.default
    for needed in ([True] * 4, [False, False, True, False], [True, False, False, False]):
        arguments = (grad, x, raw, weight, *pairs, 1, True, False, *needed, False)
        torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_and_exports_in_one_graph(device: str) -> None:
    layer = DCN(4, 6, 3, 2).to(device)
    layer.backend = "triton"
    torch.nn.init.normal_(layer.conv_offset_mask.weight, std=0.2)
    x = torch.randn(2, 4, 8, 6, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, got = layer(x), compiled(x)
    assert torch.allclose(got, expected, atol=1e-6)
    parameters = list(layer.parameters())
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in (expected, got)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads))
    program = torch.export.export(layer, (x,))
    assert torch.allclose(program.module()(x), expected, atol=1e-6)
    assert any("dcn.forward" in str(node.target) for node in program.graph.nodes)


def test_autocast_gives_its_own_dtype_from_mixed_input(device: str) -> None:
    (x, raw, weight, bias), geometry = raw_inputs(device)
    expected = deform_conv2d_raw(x, raw, weight, bias, *geometry, backend="torchvision")
    with torch.autocast(device, torch.float16):
        y = deform_conv2d_raw(x, raw, weight, bias, *geometry, backend="triton")
    y.float().sum().backward()
    assert y.dtype == torch.float16 and relative(y.detach(), expected.detach().double()) < 1e-3
    assert all(t.grad.dtype == torch.float32 for t in (x, raw, weight, bias))


def test_second_derivative_is_refused(device: str) -> None:
    (x, raw, weight, bias), geometry = raw_inputs(device)
    y = deform_conv2d_raw(x, raw, weight, bias, *geometry, backend="triton")
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="deformable convolution has no second derivative"):
        g.sum().backward()


WITHOUT_COMPILER = """
import sys, torch
from models.ops.deform_conv import deform_conv2d_raw
device, backend = sys.argv[1:]
x, raw = (torch.randn(1, n, 4, 4, device=device, requires_grad=True) for n in (16, 27))
weight = torch.randn(16, 16, 3, 3, device=device, requires_grad=True)
deform_conv2d_raw(x, raw, weight, None, (1, 1), (1, 1), (1, 1), backend=backend).sum().backward()
assert x.grad.abs().sum() > 0 and "torch._dynamo" not in sys.modules
"""


class Unlike(torch.nn.Module):
    """A frame that the compiler gives up as a whole: a break of its graph within blocks."""

    def forward(self, x: Tensor, raw: Tensor, weight: Tensor) -> Tensor:
        with contextlib.suppress(ValueError):
            torch._dynamo.graph_break()
            x = torch.ops.dcn.forward(x * 2, raw, weight, None, (1, 1), (1, 1), (1, 1), 1, True, False, False)
            x.sum().backward()
        return x


def test_the_compiler_does_not_look_into_the_kernels(device: str) -> None:
    x, raw = (torch.randn(1, n, 4, 4, device=device, requires_grad=True) for n in (16, 27))
    weight = torch.randn(16, 16, 3, 3, device=device, requires_grad=True)
    expected = Unlike()(x, raw, weight)
    torch._dynamo.reset()
    got = torch.compile(Unlike(), backend="eager")(x, raw, weight)
    assert torch.equal(got, expected) and raw.grad.abs().sum() > 0


def test_the_operators_do_not_import_the_compiler(device: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0" if device == "cuda" else "1"}
    command = [sys.executable, "-c", WITHOUT_COMPILER, device, "triton"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (1, 2)])
def test_gradients_on_demand(needed: tuple[int, ...], device: str) -> None:
    inputs, geometry = raw_inputs(device)
    y = deform_conv2d_raw(*inputs, *geometry, backend="triton")
    everything = torch.autograd.grad(y.sum(), inputs)
    some = [t.detach().requires_grad_(index in needed) for index, t in enumerate(inputs)]
    deform_conv2d_raw(*some, *geometry, backend="triton").sum().backward()
    for index, t in enumerate(some):
        assert (t.grad is not None) == (index in needed)
        assert t.grad is None or torch.allclose(t.grad, everything[index], atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("capability", ["89", "90"])
def test_kernels_fit_gpus_that_are_not_here(capability: str, device: str) -> None:
    """Compiled for an RTX 40 and an H100: no error, and no more shared memory than they have."""
    command = [sys.executable, "-m", "tests.models.compile_kernels", capability]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"sm_{capability}") == 12


# ---- choice of the backend


def test_choice(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = device == "cuda"
    assert backend_for(device, torch.float32, "triton") == "triton"
    assert backend_for(device, torch.float32, "auto") == ("triton" if on_gpu else "torchvision")
    assert backend_for(device, torch.bfloat16, "auto") == ("cuda" if on_gpu else "torchvision")
    assert backend_for(device, torch.float32, "torchvision") == "torchvision"
    with pytest.raises(ValueError, match="float64 is not supported"):
        backend_for(device, torch.float64, "triton")
    with pytest.raises(ValueError, match="float32 is not supported" if on_gpu else "needs a CUDA device, not cpu"):
        backend_for(device, torch.float32, "cuda")
    with pytest.raises(ValueError, match="choose one of auto, cuda, triton, torchvision"):
        backend_for(device, torch.float32, "mmcv")
    if on_gpu:
        monkeypatch.setattr(nvrtc, "obstacle", lambda: "no NVRTC")
        assert backend_for(device, torch.bfloat16, "auto") == "triton"
    monkeypatch.setattr(deform_conv, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton package is not installed"):
        backend_for(device, torch.float32, "triton")
    assert backend_for(device, torch.float32) == "torchvision"


@pytest.mark.usefixtures("taps")
def test_silu_inside_the_kernel(device: str) -> None:
    (x, raw, weight, bias), geometry = raw_inputs(device)
    expected = F.silu(deform_conv2d_raw(x, raw, weight, bias, *geometry, backend="torchvision"))
    with torch.no_grad():
        inside = deform_conv2d_raw(x, raw, weight, bias, *geometry, backend="triton", silu=True)
    after = deform_conv2d_raw(x, raw, weight, bias, *geometry, backend="triton", silu=True)
    assert after.requires_grad and not inside.requires_grad
    assert relative(inside, expected.detach().double()) < 1e-6 and relative(after.detach(), expected.detach()) < 1e-6
    pairs = [list(p) if isinstance(p, tuple) else [p, p] for p in geometry]
    with pytest.raises(RuntimeError, match="silu has no backward"):
        torch.ops.dcn.forward(x, raw, weight, bias, *pairs, 1, True, False, True)


def test_an_image_beyond_the_counters_goes_to_torchvision(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, geometry = make("article")
    tensors = [t.float().to(device) for t in tensors]
    monkeypatch.setattr(deform_conv, "LARGEST_IMAGE", 50)
    with pytest.raises(ValueError, match="more than 2\\^31 elements"):
        fused(*tensors, *geometry)
    deform_conv2d(*tensors, *geometry)
