"""The kernels in CUDA C++ against float64: on a GPU, or on the CPU through tests/models/emulator."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from torch import Tensor

from models.common import DCN
from models.ops import dcn_cuda, nvrtc
from models.ops.deform_conv import deform_conv2d_raw
from models.ops.geometry import Geometry
from tests.models import emulator

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not shutil.which(emulator.COMPILER), reason="no C++ compiler")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Twice the unit roundoff: the columns, or their gradient, and the result are each rounded once."""
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}
"""Bytes a block may have (CUDA C++ Programming Guide, table of technical specifications)."""


def kernel(device: str):
    return nvrtc.kernel if device == "cuda" else emulator.kernel


def layer(
    c: int, n: int, size: tuple[int, int], batch: int = 1, stride: int = 1, padding: int = 1, dilation: int = 1,
    spread: float = 1.5, dtype: torch.dtype = torch.float16, raw_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor, tuple[int, int, int]]:  # fmt: skip
    """[x, raw, weight], the output's gradient and the geometry. Offsets stay off whole pixels, where the derivative
    jumps."""
    g = torch.Generator().manual_seed(0)
    out = [(side + 2 * padding - 2 * dilation - 1) // stride + 1 for side in size]
    offset = (torch.randn(batch, 18, *out, generator=g) * spread).floor() + 0.1
    offset += 0.8 * torch.rand(offset.shape, generator=g)
    raw = torch.cat([offset, torch.randn(batch, 9, *out, generator=g)], 1).to(raw_dtype or dtype)
    x = torch.randn(batch, c, *size, generator=g).to(dtype)
    weight = (torch.randn(n, c, 3, 3, generator=g) / math.sqrt(9 * c)).to(dtype)
    grad = torch.randn(batch, n, *out, generator=g).to(dtype)
    return [x, raw, weight], grad, (stride, padding, dilation)


def expected(inputs: list[Tensor], grad: Tensor, steps: tuple[int, int, int]) -> list[Tensor]:
    exact = [t.double().requires_grad_() for t in inputs]
    y = deform_conv2d_raw(*exact, None, *steps, backend="torchvision")
    return list(torch.autograd.grad(y, exact, grad.double()))


def gradients(inputs: list[Tensor], grad: Tensor, steps: tuple[int, int, int], device: str, **choice) -> list[Tensor]:
    x, raw, weight, grad = (t.to(device) for t in (*inputs, grad))
    geometry = Geometry.of(x, weight, *((step, step) for step in steps), 1, True)
    grad_x, grad_raw = dcn_cuda.backward(grad, x, raw, weight, geometry, True, kernel=kernel(device), **choice)
    return [grad_x, grad_raw, dcn_cuda.backward_weight(grad, x, raw, weight, geometry, kernel(device))]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b).norm() / b.norm())


CASES = {
    "article": layer(80, 32, (20, 18), 2, stride=2),
    "stride 1, bf16": layer(48, 48, (9, 13), dtype=torch.bfloat16),
    "stride 3, no padding": layer(16, 16, (17, 29), 2, stride=3, padding=0),
    "dilated, float32 offsets": layer(32, 16, (14, 11), padding=2, dilation=2, raw_dtype=torch.float32),
    "far": layer(16, 32, (40, 40), stride=2, spread=8.0),
    "narrower than a tile": layer(16, 16, (1, 3), 3),
    "wide steps": layer(80, 16, (10, 10), stride=2),
}


@on_each_device
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case: str, fused: bool, device: str) -> None:
    inputs, grad, steps = CASES[case]
    for got, want in zip(gradients(inputs, grad, steps, device, fused=fused), expected(inputs, grad, steps)):
        assert relative(got, want) < LIMIT[inputs[0].dtype]


@on_each_device
def test_a_ring_with_more_groups_than_slots(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of one image at a time: each slot is turned and used again."""
    inputs, grad, steps = layer(16, 16, (12, 20), 7, stride=2)
    monkeypatch.setattr(dcn_cuda, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(dcn_cuda, "COLUMN_BYTES", 1)
    want = expected(inputs, grad, steps)
    for fused in (True, False):
        assert all(relative(a, b) < 1e-3 for a, b in zip(gradients(inputs, grad, steps, device, fused=fused), want))


@on_each_device
def test_layouts_and_addresses_do_not_matter(device: str) -> None:
    inputs, grad, steps = CASES["stride 3, no padding"]
    want = gradients(inputs, grad, steps, device, fused=True)
    odd = torch.empty(inputs[0].numel() + 1, dtype=inputs[0].dtype)[1:]
    x = inputs[0].contiguous(memory_format=torch.channels_last)
    shifted = odd.copy_(x.permute(0, 2, 3, 1).flatten()).view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    assert shifted.data_ptr() % 16
    for variant in ([shifted, *inputs[1:]], [t.contiguous(memory_format=torch.channels_last) for t in inputs]):
        got = gradients(variant, grad, steps, device, fused=True)
        assert all(torch.allclose(a.float(), b.float(), atol=1e-2) for a, b in zip(got, want))


@on_each_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_bad_offsets(bad: float, device: str) -> None:
    """NaN shows up as NaN in its own gradients; infinity samples outside, where all gradients are 0."""
    inputs, grad, steps = layer(16, 16, (9, 9), raw_dtype=torch.float32)
    inputs[1][0, 5, 4, 4] = bad
    for fused in (True, False):
        grad_x, grad_raw, grad_weight = gradients(inputs, grad, steps, device, fused=fused)
        assert grad_x.isfinite().all()
        assert bool(grad_raw[0, 5, 4, 4].isnan()) == math.isnan(bad)
        assert bool(grad_weight.isnan().any()) == math.isnan(bad)
        assert math.isnan(bad) or grad_raw[0, 4:6, 4, 4].tolist() == [0, 0]
        grad_raw[0, [4, 5, 20], 4, 4] = 0
        assert grad_raw.isfinite().all()


@on_each_device
def test_nothing_to_do(device: str) -> None:
    inputs, grad, steps = layer(16, 16, (9, 9), batch=0)
    got = gradients(inputs, grad, steps, device)
    assert [t.shape for t in got] == [t.shape for t in inputs] and not got[2].any()


@on_each_device
@pytest.mark.parametrize("fused", [True, False])
def test_offsets_alone(fused: bool, device: str) -> None:
    """A frozen layer below asks for no gradient of x."""
    inputs, grad, steps = CASES["article"]
    x, raw, weight, grad = (t.to(device) for t in (*inputs, grad))
    geometry = Geometry.of(x, weight, *((step, step) for step in steps), 1, True)
    grad_x, grad_raw = dcn_cuda.backward(grad, x, raw, weight, geometry, False, fused=fused, kernel=kernel(device))
    assert grad_x.numel() == 0 and relative(grad_raw, expected(*CASES["article"])[1]) < 1e-3


def test_a_kernel_that_cannot_start_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args, **kwargs):
        raise nvrtc.CudaKernelError("no room")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dcn_cuda, "backward", fail)
    inputs, grad, _ = layer(16, 16, (3, 3), stride=2)
    pair = [2, 2], [1, 1], [1, 1]
    with pytest.warns(UserWarning, match="cuda gives way to triton: no room"):
        got = torch.ops.dcn.backward(grad, *inputs, *pair, 1, True, True, True, True, True, True, False)
    assert all(relative(a, b) < 1e-3 for a, b in zip(got, expected(inputs, grad, (2, 1, 1))))
    assert relative(got[3], grad.double().sum((0, 2, 3))) < 1e-6


def test_suits() -> None:
    x, weight = torch.empty(1, 32, 8, 8).half(), torch.empty(16, 32, 3, 3)
    assert dcn_cuda.suits(x, weight, 1)
    assert not dcn_cuda.suits(x.float(), weight, 1)
    assert not dcn_cuda.suits(x, weight, 2)
    assert not dcn_cuda.suits(x, torch.empty(16, 16, 3, 3), 1)
    assert not dcn_cuda.suits(x, torch.empty(16, 32, 1, 1), 1)
    assert not dcn_cuda.suits(x, torch.empty(24, 32, 3, 3), 1)


# ---- compiled for GPUs that need not be there


def constants(**choice: int) -> dict[str, int]:
    inputs, _, _ = layer(80, 160, (3, 3))
    geometry = Geometry.of(inputs[0], inputs[2], (2, 2), (1, 1), (1, 1), 1, True)
    return {**geometry.constants(), "RAW": 0, "BF16": 0, **choice}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_for(architecture: str) -> None:
    """NVRTC, which comes with torch, needs no GPU."""
    try:
        nvrtc.nvrtc_version()
    except OSError:
        pytest.skip("this build of torch has no NVRTC")
    for tiles in (dcn_cuda.FUSED, dcn_cuda.APART_SMALL):
        ring = tiles["FUSED"]
        code = nvrtc.compile_source("backward_input", constants(HALO=3, NEED_X=1, RING=ring, **tiles), architecture)
        assert code[:4] == b"\x7fELF"
    assert nvrtc.compile_source("columns", constants(**dcn_cuda.column_tiles(80)), architecture)[:4] == b"\x7fELF"


def test_a_fault_in_the_source_is_named() -> None:
    try:
        nvrtc.nvrtc_version()
    except OSError:
        pytest.skip("this build of torch has no NVRTC")
    with pytest.raises(nvrtc.CudaKernelError, match="columns.cu.*CHANNELS"):
        nvrtc.compile_source("columns", {"BF16": 0}, "sm_90")


@pytest.mark.skipif(not shutil.which(emulator.COMPILER), reason="no C++ compiler")
def test_shared_memory() -> None:
    """Every GPU has a way that fits; the H100's are as wide as its two blocks a multiprocessor allow."""
    device = torch.device("cpu")
    common = {"HALO": 3, "NEED_X": 1}
    fused = emulator.kernel("backward_input", constants(**common, **dcn_cuda.FUSED, RING=1), device).shared
    apart = emulator.kernel("backward_input", constants(**common, **dcn_cuda.APART, RING=0), device).shared
    small = emulator.kernel("backward_input", constants(**common, **dcn_cuda.APART_SMALL, RING=0), device).shared
    assert 2 * (fused + 1024) < SHARED["sm_90"] and apart < SHARED["sm_80"] and small < SHARED["sm_86"]


# ---- on the GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_takes_them(dtype: torch.dtype) -> None:
    """A layer's gradients are Triton's, to rounding; none of Triton's backward kernels is called."""
    torch.manual_seed(0)
    block = DCN(96, 64, 3, 2).cuda()
    torch.nn.init.normal_(block.conv_offset_mask.weight, std=0.05)
    image = torch.randn(4, 96, 64, 48, device="cuda")
    found = {}
    for backend in ("triton", "cuda"):
        block.backend = backend
        x = image.clone().requires_grad_()
        with torch.autocast("cuda", dtype), torch.profiler.profile() as profile:
            y = block(x).float()
            found[backend] = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        kernels = {event.key for event in profile.key_averages()}
        assert ("backward_weight" in kernels) == (backend == "triton")
        assert ("columns" in kernels) == (backend == "cuda")
    assert all(relative(a, b.cpu().double()) < 2 * LIMIT[dtype] for a, b in zip(*found.values()))


@pytest.mark.gpu
def test_large_maps_agree_with_triton() -> None:
    """Hundreds of blocks that wait for one another: the ring turns while they run."""
    from models.ops import dcn_launch

    inputs, grad, steps = layer(32, 64, (320, 320), 8, stride=2)
    x, raw, weight, grad = (t.cuda().contiguous(memory_format=torch.channels_last) for t in (*inputs, grad))
    geometry = Geometry.of(x, weight, *((step, step) for step in steps), 1, True)
    inputs = (grad, x, raw, weight, geometry)
    want = [*dcn_launch.backward(*inputs, True, False), dcn_launch.backward_weight(*inputs)]
    for _ in range(5):
        got = [*dcn_cuda.backward(*inputs, True), dcn_cuda.backward_weight(*inputs)]
        assert all(relative(a, b.cpu().double()) < 1e-3 for a, b in zip(got, want))


@pytest.mark.gpu
def test_more_than_2_to_31_elements() -> None:
    image, grad, steps = layer(16, 16, (256, 256), stride=2)
    x, raw, g = (t.cuda().contiguous(memory_format=torch.channels_last) for t in (*image[:2], grad))
    count = 2100
    x, raw, g = (t.expand(count, -1, -1, -1).contiguous(memory_format=torch.channels_last) for t in (x, raw, g))
    assert x.numel() > 2**31
    weight = image[2].cuda()
    geometry = Geometry.of(x, weight, *((step, step) for step in steps), 1, True)
    grad_x, grad_raw = dcn_cuda.backward(g, x, raw, weight, geometry, True)
    assert torch.allclose(grad_x[0], grad_x[-1], atol=1e-2) and torch.equal(grad_raw[0], grad_raw[-1])
    assert float(grad_x[-1].float().std()) > 0
