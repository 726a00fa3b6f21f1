"""Folding norms, freezing layers, choosing the kernels of DCN layers."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from models.common import DCN, DCNConv
from models.ensemble import Ensemble
from models.surgery import freeze, fuse, set_dcn_backend, use_dcn_backend
from models.yolo import DetectionModel
from tests.models.reference import fill, image
from utils.errors import ConfigError


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["yolov5n.yaml", "yolov5s-ghost.yaml", "yolov5s-transformer.yaml", "yolov5s-dcnconv.yaml", "yolov5n-dcn.yaml"],
)
def test_fused_output_is_the_same(name: str) -> None:
    model, x = fill(DetectionModel(name, nc=2), 1.0).double(), image((1, 3, 64, 64)).double()
    expected, _ = model(x)
    assert fuse(model) is model
    decoded, _ = model(x)
    assert torch.allclose(decoded, expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    keys = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == keys and keys[:2] == ["model.0.conv.weight", "model.0.conv.bias"]


@torch.no_grad()
def test_dcnconv_folds_its_own_bias() -> None:
    layer, x = fill(DCNConv(4, 8, 3, 2)).double(), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert layer.conv.bias.abs().min() > 0
    expected = layer(x)
    assert torch.allclose(fuse(layer)(x), expected, atol=1e-12)
    assert isinstance(layer.bn, nn.Identity)
    assert sorted(layer.state_dict()) == [
        "conv.bias",
        "conv.conv_offset_mask.bias",
        "conv.conv_offset_mask.weight",
        "conv.weight",
    ]


def test_freeze_by_layer_number() -> None:
    model = DetectionModel("yolov5n.yaml", nc=1)
    frozen = freeze(model, [1, 20])
    assert frozen and all(name.startswith(("model.1.", "model.20.")) for name in frozen)
    assert "model.10.conv.weight" not in frozen and "model.2.cv1.conv.weight" not in frozen
    assert not model.model[1].conv.weight.requires_grad and model.model[2].cv1.conv.weight.requires_grad
    freeze(model, [])
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_norms_still_follow_the_data() -> None:
    model = DetectionModel("yolov5n.yaml", nc=1)
    freeze(model, range(25))
    model(torch.rand(2, 3, 64, 64))
    assert model.model[0].bn.num_batches_tracked == 1


@pytest.mark.parametrize("layer", [25, -1])
def test_freeze_refuses_a_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(ConfigError, match=f"--freeze: there is no layer {layer}, the model has layers 0..24"):
        freeze(DetectionModel("yolov5n.yaml", nc=1), [layer])


def backends(model: nn.Module) -> list[str]:
    return [module.backend for module in model.modules() if isinstance(module, DCN)]


@pytest.mark.parametrize(("name", "layers"), [("yolov5n-dcn.yaml", 3), ("yolov5s-c3dcn.yaml", 4), ("yolov5n.yaml", 0)])
def test_the_dcn_backend_reaches_every_layer_and_stays(name: str, layers: int) -> None:
    model = DetectionModel(name, nc=2)
    keys = list(model.state_dict())
    assert backends(model) == ["auto"] * layers
    assert set_dcn_backend(model, "torchvision") == layers
    assert list(model.state_dict()) == keys
    assert backends(model) == backends(deepcopy(model)) == backends(fuse(model)) == ["torchvision"] * layers


def test_the_dcn_backend_reaches_an_ensemble() -> None:
    model = Ensemble([DetectionModel(name, nc=2) for name in ("yolov5n-dcn.yaml", "yolov5n.yaml", "yolov5n-dcn.yaml")])
    assert set_dcn_backend(model, "torchvision") == 6
    assert backends(model) == ["torchvision"] * 6


def test_a_dcn_backend_that_cannot_run_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="^--dcn-backend triton: [^:\n]*CUDA[^:\n]*; use --dcn-backend auto$"):
        use_dcn_backend(DCNConv(4, 8), "triton", torch.device("cpu"), torch.float32)
    use_dcn_backend(nn.Conv2d(4, 8, 3), "triton", torch.device("cpu"), torch.float32)
