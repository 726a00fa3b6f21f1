"""The DCN op and a DCN model on a CUDA device (``make test-gpu``)."""

from __future__ import annotations

import math

import pytest
import torch

from models.common import DCN
from models.ops.deform_conv import deform_conv2d, deform_conv2d_raw
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


@pytest.mark.parametrize("backend", ["triton", "torchvision"])
def test_a_cuda_graph_replays_the_layer(backend: str) -> None:
    """Forward and backward captured once; the replay follows the input's new values."""
    layer, x = DCN(16, 32, 3, 2).cuda(), torch.randn(2, 16, 20, 20, device="cuda", requires_grad=True)
    layer.backend = backend
    torch.nn.init.normal_(layer.conv_offset_mask.weight, std=0.1)
    fresh = torch.randn_like(x)
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    inputs = [fresh.clone().requires_grad_() for _ in range(2)]
    outputs = [network(image) for network, image in zip((layer, graphed), inputs)]
    gradients = [torch.autograd.grad(y.square().sum(), image)[0] for y, image in zip(outputs, inputs)]
    for a, b in (outputs, gradients):
        assert torch.allclose(a, b, atol=1e-4)


def test_two_streams_do_not_disturb_each_other() -> None:
    layer = DCN(16, 32, 3, 2).cuda()
    layer.backend = "triton"
    torch.nn.init.normal_(layer.conv_offset_mask.weight, std=0.1)
    images = [torch.randn(4, 16, 96, 96, device="cuda") for _ in range(2)]
    expected = [layer(image) for image in images]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in images]
    for _ in range(5):
        got = []
        for stream, image in zip(streams, images):
            with torch.cuda.stream(stream):
                got.append(layer(image))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_more_than_2_to_31_elements() -> None:
    """Counters within an image are 32 bits wide, across images 64: the last image must be as right as the first."""
    image = torch.randn(1, 8, 512, 512, device="cuda", dtype=torch.float16)
    x = image.to(memory_format=torch.channels_last).repeat(1040, 1, 1, 1)
    assert x.numel() > 2**31
    raw = torch.randn(1, 3, 256, 256, device="cuda").repeat(1040, 1, 1, 1).half()
    weight = torch.randn(16, 8, 1, 1, device="cuda").half()
    y = deform_conv2d_raw(x, raw, weight, None, 2, backend="triton")
    assert torch.equal(y[0], y[-1]) and float(y[0].float().std()) > 0
