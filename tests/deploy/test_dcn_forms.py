"""DCN layers in their export forms compute what the layers do; sampling stays in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deploy.dcn_forms import DCN_FORMS, use_dcn_form
from deploy.wrap import ExportModel, decode_raw
from models.common import DCN, DCNConv
from models.loading import load_model
from models.surgery import fuse


def wild(layer: DCN) -> DCN:
    """Offsets of a few pixels, many of them beyond the border."""
    for name, values in layer.conv_offset_mask.named_parameters():
        nn.init.normal_(values, std=2 if name.endswith("bias") else 0.3)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "3x3, stride 2": (8, 12, 3, 2),
    "1x1": (8, 12, 1, 1),
    "5x5, padding 1": (4, 6, 5, 1, 1),
    "3x5, stride and padding by axis": (4, 6, (3, 5), (2, 1), (0, 3)),
    "dilation, groups": (8, 12, 3, 1, 2, 2, 2),
    "groups and offset groups": (8, 12, 3, 2, None, 1, 2, 4),
    "separable": (8, 12, 3, 2, None, 1, 1, 2, True),
    "bounded": (8, 12, 3, 1, None, 1, 1, 1, False, 1.5),
    "separable and bounded": (4, 6, 5, 1, 1, 1, 1, 1, True, 1.5),
}


@pytest.mark.parametrize("form", DCN_FORMS)
@pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
def test_a_form_gives_what_the_layer_gives(arguments: tuple, form: str) -> None:
    model = nn.Sequential(wild(DCN(*arguments))).eval()
    image = torch.randn(2, arguments[0], 13, 10)
    with torch.no_grad():
        expected = model(image)
        assert use_dcn_form(model, form) == 1
        torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", DCN_FORMS)
def test_the_silu_that_fusing_moves_into_the_layer_stays(form: str) -> None:
    block = DCNConv(4, 6).eval()
    wild(block.conv)
    model = fuse(nn.Sequential(block))
    image = torch.randn(1, 4, 9, 9)
    expected = model(image)
    use_dcn_form(model, form)
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", DCN_FORMS)
def test_half_samples_in_float32(form: str, tiny) -> None:
    model = ExportModel(load_model(tiny), form, half=True)
    sampling = model.model.model[1].sampling
    assert model.model.model[0].conv.weight.dtype == torch.float16
    assert sampling.weight.dtype == torch.float32
    assert model.model.detect.anchors.dtype == torch.float32
    seen = []
    sampling.register_forward_hook(lambda _module, inputs, _output: seen.extend(each.dtype for each in inputs))
    assert model(torch.rand(1, 3, 64, 64).half()).dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_the_model_itself_is_left_alone(tiny) -> None:
    model = load_model(tiny)
    ExportModel(model, "deformconv", half=True)
    assert isinstance(model.model[1], DCN)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_logits_decoded_outside_of_the_file(tiny) -> None:
    model = load_model(tiny)
    decoded, raw = model(torch.rand(1, 3, 64, 96))
    levels = [y.permute(0, 1, 4, 2, 3).flatten(1, 2) for y in raw]
    anchors = model.detect.anchors * model.stride.view(-1, 1, 1)
    assert torch.equal(decode_raw(levels, anchors, model.stride.tolist()), decoded)
