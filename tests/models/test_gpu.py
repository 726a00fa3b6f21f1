"""The DCN op and a DCN model on a CUDA device (``make test-gpu``)."""

from __future__ import annotations

import math

import pytest
import torch

from models.common import DCN
from models.ops.deform_conv import deform_conv2d
from models.yolo import DetectionModel
from tests.models.test_deform_conv import CASES, large, make, relative

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
def test_equals_the_cpu(case: str) -> None:
    tensors, geometry = make(case)
    expected = deform_conv2d(*tensors, *geometry)
    on_gpu = [t.float().cuda() for t in tensors]
    assert relative(deform_conv2d(*on_gpu, *geometry).cpu(), expected) < 1e-5
    channels_last = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in on_gpu]
    assert relative(deform_conv2d(*channels_last, *geometry).cpu(), expected) < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision(dtype: torch.dtype, limit: float) -> None:
    rounded, _ = large()
    tensors = [t.to(dtype).cuda() for t in rounded]
    expected = deform_conv2d(*[t.double() for t in tensors], padding=1)
    y = deform_conv2d(*tensors, padding=1)
    assert y.dtype == dtype and relative(y, expected) < limit
    with torch.autocast("cuda", dtype):
        y = deform_conv2d(tensors[0].float(), *tensors[1:3], tensors[3].float(), tensors[4].float(), padding=1)
    assert y.dtype == dtype and relative(y, expected) < limit


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_bad_offsets_do_not_fault(bad: float) -> None:
    tensors, geometry = make("article")
    inputs = [t.float().cuda() for t in tensors]
    clean = deform_conv2d(*inputs, *geometry)
    inputs[1][0, 3, 1, 2] = bad
    inputs = [t.requires_grad_() for t in inputs]
    y = deform_conv2d(*inputs, *geometry)
    assert torch.equal(y[..., 0, :], clean[..., 0, :])
    assert bool(y[..., 1, 2].isnan().all()) == math.isnan(bad)
    y.sum().backward()
    torch.cuda.synchronize()
    assert math.isnan(bad) or all(t.grad.isfinite().all() for t in inputs)


def test_layer_never_waits_for_the_device() -> None:
    layer, x = DCN(8, 8, 3, 2).cuda(), torch.randn(2, 8, 32, 32, device="cuda", requires_grad=True)
    layer(x).sum().backward()  # first use: libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_trains_and_detects(dtype: torch.dtype) -> None:
    model = DetectionModel("yolov5n-dcn4.yaml", nc=2).cuda().to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 128, 96, device="cuda")
    with torch.autocast("cuda", dtype):
        raw = model(images)
        loss = sum(y.float().square().mean() for y in raw)
    loss.backward()
    assert all(y.dtype == dtype for y in raw)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    decoded, _ = model.eval().to(dtype)(images.to(dtype))
    assert decoded.dtype == torch.float32 and decoded.isfinite().all()
