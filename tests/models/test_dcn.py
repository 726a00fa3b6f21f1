"""The DCN layer and the blocks that hold it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models.common import C3DCN, DCN, Conv, DCNConv
from models.yolo import DetectionModel

ARTICLE_KEYS = {
    "weight": (8, 4, 3, 3),
    "bias": (8,),
    "conv_offset_mask.weight": (27, 4, 3, 3),
    "conv_offset_mask.bias": (27,),
}


def disturbed(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that offsets are a pixel or so."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return layer


def test_state_dict_is_the_articles() -> None:
    assert {key: tuple(value.shape) for key, value in DCN(4, 8, 3, 2).state_dict().items()} == ARTICLE_KEYS
    assert list(DCNConv(4, 8).state_dict())[:4] == [f"conv.{key}" for key in ARTICLE_KEYS]


def test_article_weights_mean_the_same() -> None:
    """Its chunk into three, then offsets = cat of the first two, is the slice used here."""
    layer, x = disturbed(DCN(4, 8, 3, 2)), torch.randn(2, 4, 9, 11)
    first, second, logits = layer.conv_offset_mask(x).chunk(3, 1)
    expected = torchvision.ops.deform_conv2d(
        x, torch.cat((first, second), 1), layer.weight, layer.bias, stride=2, padding=1, mask=logits.sigmoid()
    )
    assert torch.equal(layer(x), expected)


def test_starts_as_half_a_convolution() -> None:
    layer, x = DCN(4, 8, 3, 2).double(), torch.randn(2, 4, 9, 11, dtype=torch.float64)
    assert torch.allclose(layer(x), 0.5 * F.conv2d(x, layer.weight, None, 2, 1), atol=1e-14)
    bound = 1 / (4 * 9) ** 0.5
    assert layer.weight.abs().max() <= bound and layer.weight.std() > bound / 3
    assert not layer.bias.any()


@pytest.mark.parametrize(
    "kwargs", [{"k": 5}, {"k": (1, 3)}, {"d": 2}, {"g": 2}, {"p": 0}, {"s": 2, "offset_groups": 4}]
)
def test_size_is_that_of_a_convolution(kwargs: dict) -> None:
    x = torch.randn(1, 4, 12, 10)
    plain = {k: v for k, v in kwargs.items() if k != "offset_groups"}
    assert disturbed(DCN(4, 8, **kwargs))(x).shape == Conv(4, 8, **{"k": 3, **plain})(x).shape


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 groups do not divide c1 = 4"):
        DCN(4, 8, g=3)


def test_hook_on_the_offset_convolution_sees_all_channels() -> None:
    layer, seen = DCN(4, 8, 3, 2), []
    layer.conv_offset_mask.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    layer(torch.randn(1, 4, 8, 8))
    assert seen == [(1, 27, 4, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_model(dtype: torch.dtype) -> None:
    layer, x = disturbed(DCN(4, 8)), torch.randn(1, 4, 160, 6)
    low = DCN(4, 8).to(dtype)
    low.load_state_dict(layer.state_dict())
    y = low(x.to(dtype))
    reference = DCN(4, 8).double()
    reference.load_state_dict(low.state_dict())
    expected = reference(x.to(dtype).double())
    assert y.dtype == dtype
    assert (y.double() - expected).norm() / expected.norm() < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_trains_under_autocast() -> None:
    layer = disturbed(DCNConv(4, 8, 3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 4, 16, 16))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.conv.conv_offset_mask.weight.grad.abs().sum() > 0


def test_nan_image_does_not_end_the_process() -> None:
    layer = disturbed(DCN(4, 8, 3, 2))
    y = layer(torch.full((1, 4, 9, 9), float("nan"), requires_grad=True))
    assert y.isnan().all()
    y.sum().backward()


def test_c3dcn_deforms_every_bottleneck() -> None:
    block = C3DCN(8, 16, 2)
    assert [type(b.cv2) for b in block.m] == [DCNConv, DCNConv]
    assert block(torch.randn(1, 8, 6, 6)).shape == (1, 16, 6, 6)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("yolov5n-dcn.yaml", [1, 3, 5]), ("yolov5n-dcn4.yaml", [1, 3, 5, 7]), ("hub/yolov5s-dcnconv.yaml", [1, 3, 5])],
)
def test_model_with_dcn_layers(name: str, layers: list[int]) -> None:
    model = DetectionModel(name, nc=3)
    assert [m.i for m in model.model if isinstance(m, (DCN, DCNConv))] == layers
    raw = model(torch.rand(1, 3, 64, 64))
    sum(y.square().mean() for y in raw).backward()
    assert [tuple(y.shape) for y in raw] == [(1, 3, 8, 8, 8), (1, 3, 4, 4, 8), (1, 3, 2, 2, 8)]
    assert all(p.grad is not None for p in model.parameters())
