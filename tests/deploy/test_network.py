"""The network description: in ONNX Runtime beside PyTorch, and as TensorRT holds it, read back and computed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploy.tensorrt.backend import Backend, Map
from deploy.tensorrt.build import load_sized
from deploy.tensorrt.network import INPUT, Layers, describe_network
from deploy.tensorrt.onnx_backend import OnnxNetwork
from deploy.tensorrt.sizes import layers_of
from deploy.tensorrt.trt_backend import EngineOptions, TensorRtNetwork, load_tensorrt
from deploy.to_wts import wts_tensors
from models.common import C3, DCN, Conv, DCNConv
from models.extra import GDCNConv
from models.surgery import fuse
from models.yolo import DetectionModel
from tests.deploy.trt_interpreter import needs_wheel, run_network
from utils.errors import ExportError
from utils.wts import write_wts

onnxruntime = pytest.importorskip("onnxruntime")  # not on the lent GPU machines, where only the gpu tests run
pytestmark = needs_wheel
SIZE = (64, 96)
FORMS = ["deformconv", "gridsample"]


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Offsets of a pixel or two, norms that do something: at their start both are nothing."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.7, 1.3)
            module.bias.uniform_(-0.2, 0.2)
        elif name.endswith("conv_offset_mask"):
            last = getattr(module, "pointwise", module)
            last.weight.normal_(0, 2 / last.weight[0].numel() ** 0.5)
            last.bias.normal_(0, 1)
    return model.eval()


def in_onnx(model: DetectionModel, images: Tensor, form: str, half: bool = False) -> Tensor:
    net = OnnxNetwork(form)
    describe_network(model, net, tuple(images.shape[2:]), half)
    return run_onnx(net, images)[0]


def run_onnx(net: OnnxNetwork, images: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(net.finish({}), options)
    return [torch.from_numpy(each) for each in session.run(None, {INPUT: images.numpy()})]


def in_tensorrt(model: DetectionModel, images: Tensor, half: bool = False) -> Tensor:
    trt = load_tensorrt("tensorrt_rtx")
    net = TensorRtNetwork(trt, EngineOptions())
    describe_network(model, net, tuple(images.shape[2:]), half)
    return run_network(trt, net.network, images)


def check(expected: Tensor, found: Tensor, pixels: float = 2e-3, score: float = 2e-5) -> None:
    assert found.shape == expected.shape and found.dtype == torch.float32
    apart = (found - expected).abs()
    assert float(apart[..., :4].max()) < pixels and float(apart[..., 4:].max()) < score


WORDS = [["n"], ["s_dcn"], ["n_dcn4"], ["n_dcn_best"], ["n6"], ["c_dcn", "0.5", "0.3"]]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_the_wts_computes_what_the_model_does(words: list[str], tmp_path: Path) -> None:
    """From the text file through the network to boxes, in both forms and for any batch."""
    model = lively(DetectionModel(layers_of(words), nc=3))
    write_wts(tmp_path / "a.wts", wts_tensors(model))
    images = torch.rand(3, 3, *((64, 128) if "6" in words[0] else SIZE))
    with torch.no_grad():
        expected = model(images)[0]
    read = load_sized(tmp_path / "a.wts", words)
    for form in FORMS if "dcn" in words[0] else FORMS[:1]:
        found = in_onnx(read, images, form)
        check(expected, found)
        assert torch.allclose(in_onnx(read, images[1:2], form), found[1:2], atol=1e-3)
    check(expected, in_tensorrt(read, images))


def test_logits_before_decoding() -> None:
    """Raw outputs, which decoding squeezes."""
    model = fuse(lively(DetectionModel("yolov5n-dcn.yaml", nc=3)))
    images = torch.rand(2, 3, *SIZE)
    net = OnnxNetwork("gridsample")
    _describe_logits(model, net)
    with torch.no_grad():
        expected = model(images)[1]
    for level, found in enumerate(run_onnx(net, images)):
        rows, columns = found.shape[2:]
        found = found.view(2, 3, 8, rows, columns).permute(0, 1, 3, 4, 2)
        assert torch.allclose(found, expected[level], atol=2e-4, rtol=1e-4)


def _describe_logits(model: DetectionModel, net: Backend) -> None:
    layers = Layers(net, np.float32)
    x: Map = net.input(INPUT, (3, *SIZE))
    kept: dict[int, Map] = {}
    for module, layer in zip(model.model[:-1], model.layers):
        maps = [x if i == layer.index - 1 else kept[i] for i in layer.inputs]
        x = kept[layer.index] = layers.add(module, maps if isinstance(layer.source, list) else maps[0], "")
    for level, (conv, source) in enumerate(zip(model.detect.m, model.layers[-1].inputs)):
        net.output(layers.convolution(conv, kept[source], ""), f"level{level}")


def test_blocks_of_deformable_layers(tiny: Path) -> None:
    """C3DCN, whose norms and activation are folded into its DCN."""
    model = load_sized(tiny, [])
    images = torch.rand(2, 3, *SIZE)
    expected = model(images)[0]
    for form in FORMS:
        check(expected, in_onnx(model, images, form))
    check(expected, in_tensorrt(model, images))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_samples_in_float32(form: str, weights: Path) -> None:
    model = load_sized(weights, [])
    images = torch.rand(2, 3, *SIZE)
    check(model(images)[0], in_onnx(model, images, form, half=True), pixels=0.3, score=3e-3)
    net = OnnxNetwork(form)
    describe_network(model, net, SIZE, half=True)
    types = {array.name: array.data_type for array in net.arrays}
    convolutions = [node for node in net.nodes if node.op_type == "Conv"]
    assert {types[node.input[1]] for node in convolutions} == {10}  # FLOAT16
    samplers = [node for node in net.nodes if node.op_type in ("GridSample", "DeformConv")]
    casts = {node.output[0]: node.attribute[0].i for node in net.nodes if node.op_type == "Cast"}
    assert len(samplers) == 3
    assert all(casts[node.input[0]] == 1 for node in samplers)  # the maps they read are FLOAT


def test_half_precision_as_tensorrt_holds_it(weights: Path) -> None:
    """Its types are strict; the interpreter compares them at every layer."""
    model = load_sized(weights, [])
    images = torch.rand(2, 3, *SIZE)
    check(model(images)[0], in_tensorrt(model, images, half=True), pixels=0.3, score=3e-3)


@pytest.mark.parametrize(
    "module",
    [
        DCN(8, 12, (3, 2), 2, (1, 0), (2, 1), 2, offset_groups=4),
        DCN(8, 12, 1),
        DCN(8, 12, 3, 2, separable=True, offset_groups=2),
        DCN(8, 12, bound=2.0),
        DCNConv(8, 16, 5, 1, act=False),
        GDCNConv(8, 12, 3, 2, width=4, act=False),
        Conv(8, 16, 3, 2, g=4, act=False),
        C3(8, 8, 2, shortcut=False),
    ],
    ids=["asymmetric", "1x1", "separable", "bounded", "DCNConv", "grouped", "groups", "C3"],
)
@pytest.mark.parametrize("form", [*FORMS, "tensorrt"])
def test_single_layers(module: nn.Module, form: str) -> None:
    module = fuse(lively(copy.deepcopy(module)))
    images = torch.randn(3, 8, 9, 14)
    trt = load_tensorrt("tensorrt_rtx") if form == "tensorrt" else None
    net = TensorRtNetwork(trt, EngineOptions()) if trt else OnnxNetwork(form)
    y = Layers(net, np.float32).add(module, net.input(INPUT, (8, 9, 14)), "layer")
    net.output(y, "y")
    found = run_network(trt, net.network, images) if trt else run_onnx(net, images)[0]
    with torch.no_grad():
        expected = module(images)
    assert y.shape == expected.shape[1:]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "kind"),
    [
        ("yolov5s-transformer.yaml", "C3TR"),
        ("yolov5s-ghost.yaml", "GhostConv"),
        ("yolov5s-LeakyReLU.yaml", "LeakyReLU"),
    ],
)
def test_other_layers_are_named(cfg: str, kind: str) -> None:
    model = fuse(DetectionModel(cfg).eval())
    with pytest.raises(ExportError, match=rf"model[.]\d.*: {kind} is not among.*export[.]py --include onnx"):
        describe_network(model, OnnxNetwork("gridsample"), SIZE)
