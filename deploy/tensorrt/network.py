"""A trained detector, layer by layer, in the operations of a back end (backend.py).

The one description behind both an ONNX file and a TensorRT engine: ONNX Runtime proves its numbers against PyTorch on
any machine, TensorRT builds the same thing. It follows the model's rows, so it holds for every size, with and without
DCN layers, of three levels or four.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from deploy.tensorrt.backend import Backend, Map, Steps
from models.common import C3, C3DCN, DCN, SPP, SPPF, Bottleneck, Concat, Conv, DCNBottleneck, DCNConv, DWConv
from models.extra import C3GDCN, GDCNConv
from models.head import Detect
from models.offsets import BoundedOffsets, SeparableOffsets
from models.yolo import DetectionModel
from utils.errors import ExportError

INPUT, OUTPUT = "images", "output0"
"""Names of the only input and output, those of export.py's ONNX files."""


def describe_network(model: DetectionModel, net: Backend, imgsz: tuple[int, int], half: bool = False) -> None:
    """Add input, layers and output: images (B, 3, H, W) float32 in 0..1 -> decoded (B, N, 5 + nc) float32, see
    :meth:`models.head.Detect.decode`, any B, for the one ``imgsz`` (height, width).

    ``model``: fused, float32. ``half``: layers compute in float16, but for the coordinates that DCN layers sample at
    and for decoding. Raises ExportError, naming the layer, for kinds of layers that are not described here.
    """
    channels = model.yaml.get("ch", 3)
    dtype = np.float16 if half else np.float32
    x = net.cast(net.input(INPUT, (channels, *imgsz)), dtype)
    layers = Layers(net, dtype)
    kept: dict[int, Map] = {}
    for module, layer in zip(model.model, model.layers):
        maps = [x if i == layer.index - 1 else kept[i] for i in layer.inputs]
        x = layers.add(module, maps if isinstance(layer.source, list) else maps[0], f"model.{layer.index}")
        kept[layer.index] = x
    net.output(x, OUTPUT)


class Layers:
    """What each kind of layer is made of. ``dtype``: of maps and weights between the input and decoding."""

    def __init__(self, net: Backend, dtype: Any) -> None:
        self.net, self.dtype = net, dtype

    def add(self, module: nn.Module, x: Any, name: str) -> Any:
        """Add ``module``; ``x`` is a Map, or a list where the module takes one. Raises ExportError."""
        kind = KINDS.get(type(module))
        if kind is None:
            raise ExportError(
                f"{name}: {type(module).__name__} is not among the layers described here; "
                "use export.py --include onnx, which takes any model"
            )
        return kind(self, module, x, name)

    def array(self, tensor: Tensor | None, dtype: Any = None) -> np.ndarray | None:
        """Weights as numpy has them, in ``dtype`` or the network's."""
        if tensor is None:
            return None
        return np.ascontiguousarray(tensor.detach().cpu().numpy().astype(dtype or self.dtype))

    def parts(self, module: nn.Sequential, x: Any, name: str) -> Any:
        for number, part in enumerate(module):
            x = self.add(part, x, f"{name}.{number}")
        return x

    def same(self, module: nn.Module, x: Map, name: str) -> Map:
        return x

    def silu(self, module: nn.Module | None, x: Map, name: str = "") -> Map:
        return self.net.mul(x, self.net.sigmoid(x))

    def convolution(self, module: nn.Conv2d, x: Map, name: str) -> Map:
        steps = Steps(pair(module.stride), pair(module.padding), pair(module.dilation), module.groups)
        return self.net.conv(x, self.array(module.weight), self.array(module.bias), steps)

    def conv(self, module: Conv, x: Map, name: str) -> Map:
        for part in ("conv", "bn", "act"):
            x = self.add(getattr(module, part), x, f"{name}.{part}")
        return x

    def bottleneck(self, module: Bottleneck, x: Map, name: str) -> Map:
        y = self.add(module.cv2, self.add(module.cv1, x, f"{name}.cv1"), f"{name}.cv2")
        return self.net.add(x, y) if module.add else y

    def grouped_deformable(self, module: GDCNConv, x: Map, name: str) -> Map:
        return self.add(module.pw, self.add(module.dcn, x, f"{name}.dcn"), f"{name}.pw")

    def partial(self, module: C3, x: Map, name: str) -> Map:
        inner = self.add(module.m, self.add(module.cv1, x, f"{name}.cv1"), f"{name}.m")
        joined = self.net.concat([inner, self.add(module.cv2, x, f"{name}.cv2")])
        return self.add(module.cv3, joined, f"{name}.cv3")

    def spp(self, module: SPP, x: Map, name: str) -> Map:
        x = self.add(module.cv1, x, f"{name}.cv1")
        pooled = [self.add(pool, x, f"{name}.m.{number}") for number, pool in enumerate(module.m)]
        return self.add(module.cv2, self.net.concat([x, *pooled]), f"{name}.cv2")

    def sppf(self, module: SPPF, x: Map, name: str) -> Map:
        maps = [self.add(module.cv1, x, f"{name}.cv1")]
        for _ in range(3):
            maps.append(self.add(module.m, maps[-1], f"{name}.m"))
        return self.add(module.cv2, self.net.concat(maps), f"{name}.cv2")

    def max_pool(self, module: nn.MaxPool2d, x: Map, name: str) -> Map:
        kernel = module.kernel_size
        usual = (module.stride, module.padding, module.dilation, module.ceil_mode) == (1, kernel // 2, 1, False)
        if not (isinstance(kernel, int) and kernel % 2 and usual):
            raise ExportError(f"{name}: a pool that changes the size is not among the layers described here")
        return self.net.max_pool(x, kernel)

    def upsample(self, module: nn.Upsample, x: Map, name: str) -> Map:
        factor = module.scale_factor
        if module.mode != "nearest" or not isinstance(factor, (int, float)) or factor != int(factor):
            raise ExportError(f"{name}: only nearest upsampling by a whole factor is described here")
        return self.net.upsample(x, int(factor))

    def concat(self, module: Concat, x: list[Map], name: str) -> Map:
        if module.d != 1:
            raise ExportError(f"{name}: Concat of another dimension than channels is not described here")
        return self.net.concat(x)

    def dcn(self, module: DCN, x: Map, name: str) -> Map:
        net, raw = self.net, self.add(module.conv_offset_mask, x, name)
        pairs = raw.shape[0] // 3 * 2
        offset, logits = net.take(raw, range(pairs)), net.take(raw, range(pairs, raw.shape[0]))
        offset = self.bounded(offset, getattr(module.conv_offset_mask, "bound", math.inf))
        groups = x.shape[0] // module.weight.shape[1]
        steps = Steps(pair(module.stride), pair(module.padding), pair(module.dilation), groups)
        form = net.deform_conv if net.has_deform_conv else self.grid_sampled
        weight, bias = (self.array(tensor, np.float32) for tensor in (module.weight, module.bias))
        y = form(x, offset, net.sigmoid(logits), weight, bias, steps)
        return self.silu(None, y) if module.silu else y

    def separable(self, module: SeparableOffsets, x: Map, name: str) -> Map:
        return self.convolution(module.pointwise, self.convolution(module.depthwise, x, name), name)

    def bounded(self, offset: Map, bound: float) -> Map:
        """bound * tanh(offset / bound), where tanh(z) = 2 sigmoid(2z) - 1."""
        if math.isinf(bound):
            return offset
        net = self.net
        inner, outer, shift = (
            net.constant(np.full((1, 1, 1, 1), value, offset.dtype)) for value in (2 / bound, 2 * bound, -bound)
        )
        return net.add(net.mul(net.sigmoid(net.mul(offset, inner)), outer), shift)

    def grid_sampled(
        self, x: Map, offset: Map, mask: Map, weight: np.ndarray, bias: np.ndarray | None, steps: Steps
    ) -> Map:
        """:meth:`Backend.deform_conv` from GridSample: K taps sampled below each other, times the mask, then a 1x1
        convolution over C*K channels."""
        net, kernel, (channels, height, width) = self.net, weight.shape[2:], x.shape
        taps, (rows, columns) = kernel[0] * kernel[1], offset.shape[1:]
        grid = self.sampling_grid(net.cast(offset, np.float32), kernel, (height, width), steps)
        share = channels // (offset.shape[0] // (2 * taps))  # of an offset group, which samples for itself
        maps = net.cast(net.reshape(x, share, height, width), np.float32)
        sampled = net.reshape(net.grid_sample(maps, grid), share, taps, rows, columns)
        masked = net.mul(sampled, net.cast(net.reshape(mask, 1, taps, rows, columns), np.float32))
        columns_of_taps = net.cast(net.reshape(masked, channels * taps, rows, columns), self.dtype)
        flat = weight.reshape(weight.shape[0], -1, 1, 1).astype(self.dtype)
        return net.conv(columns_of_taps, flat, bias.astype(self.dtype), Steps(groups=steps.groups))

    def sampling_grid(self, offset: Map, kernel: tuple[int, int], size: tuple[int, int], steps: Steps) -> Map:
        """offset (2*G*K, H', W') float32, pairs y, x -> (K*H', W', 2) for each group, x before y."""
        net, taps, (rows, columns) = self.net, kernel[0] * kernel[1], offset.shape[1:]
        sides = []
        for axis, count in ((1, columns), (0, rows)):
            tap = np.arange(taps) % kernel[1] if axis else np.arange(taps) // kernel[1]
            place = np.arange(count) * steps.stride[axis] - steps.padding[axis]
            place = tap[:, None] * steps.dilation[axis] + place  # (K, count): undeformed, in pixels
            shape = (1, taps, 1, count) if axis else (1, taps, count, 1)
            start = ((2 * place + 1) / size[axis] - 1).reshape(shape)
            moved = net.reshape(net.take(offset, range(axis, offset.shape[0], 2)), taps, rows, columns)
            scaled = net.mul(moved, net.constant(np.full((1, 1, 1, 1), 2 / size[axis], np.float32)))
            side = net.add(scaled, net.constant(start.astype(np.float32)))
            sides.append(net.reshape(side, taps * rows, columns, 1))
        return net.concat(sides, axis=2)

    def detect(self, module: Detect, x: list[Map], name: str) -> Map:
        levels = []
        for number, (conv, features) in enumerate(zip(module.m, x)):
            logits = self.convolution(conv, features, f"{name}.m.{number}")
            stride = float(module.stride[number])
            pixels = module.anchors[number].double().cpu().numpy() * stride
            levels.append(self.decoded(self.net.cast(logits, np.float32), pixels, stride))
        return self.net.concat(levels)

    def decoded(self, logits: Map, anchors: np.ndarray, stride: float) -> Map:
        """(A * (5 + nc), H, W), anchors (A, 2) in pixels -> (A*H*W, 5 + nc).

        With s = sigmoid: s * (linear + square * s) + cells is the centre in channels 0 and 1, the size in 2 and 3, s in
        the others. So nothing is cut apart, which a free batch makes awkward, and constants are small.
        """
        net, na, (outputs, rows, columns) = self.net, len(anchors), logits.shape
        no = outputs // na
        linear, square = np.ones((1, 1, no, 1, 1)), np.zeros((1, na, no, 1, 1))
        linear[0, 0, :4, 0, 0] = 2 * stride, 2 * stride, 0, 0
        square[0, :, 2:4, 0, 0] = 4 * anchors
        across, down = np.zeros((1, 1, no, 1, columns)), np.zeros((1, 1, no, rows, 1))
        across[0, 0, 0, 0] = (np.arange(columns) - 0.5) * stride
        down[0, 0, 1, :, 0] = (np.arange(rows) - 0.5) * stride
        linear, square, across, down = (
            net.constant(each.astype(np.float32)) for each in (linear, square, across, down)
        )
        s = net.sigmoid(net.reshape(logits, na, no, rows, columns))
        values = net.mul(s, net.add(net.mul(s, square), linear))
        values = net.add(net.add(values, across), down)
        return net.reshape(net.permute(values, 0, 2, 3, 1), na * rows * columns, no)


KINDS: dict[type[nn.Module], Callable[[Layers, Any, Any, str], Any]] = {
    nn.Sequential: Layers.parts,
    nn.Identity: Layers.same,
    nn.SiLU: Layers.silu,
    nn.Conv2d: Layers.convolution,
    BoundedOffsets: Layers.convolution,
    SeparableOffsets: Layers.separable,
    nn.MaxPool2d: Layers.max_pool,
    nn.Upsample: Layers.upsample,
    Conv: Layers.conv,
    DWConv: Layers.conv,
    DCN: Layers.dcn,
    DCNConv: Layers.conv,
    GDCNConv: Layers.grouped_deformable,
    Bottleneck: Layers.bottleneck,
    DCNBottleneck: Layers.bottleneck,
    C3: Layers.partial,
    C3DCN: Layers.partial,
    C3GDCN: Layers.partial,
    SPP: Layers.spp,
    SPPF: Layers.sppf,
    Concat: Layers.concat,
    Detect: Layers.detect,
}
"""Kinds of layers, by exact class: one derived from these may compute something else."""


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a number for both, or of the two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
