"""Run a TensorRT network definition on the CPU: read back through TensorRT's own API, computed with torch.

So what is checked is the network that TensorRT holds, not what was meant to be put into it. Engines themselves need a
GPU.
"""

from __future__ import annotations

import platform
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

needs_wheel = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="tensorrt_rtx has no package for this machine"
)
"""Where requirements-dev.txt installs it, its absence is a failure."""


def run_network(trt: ModuleType, network: Any, images: Tensor) -> Tensor:
    """The only output of ``network`` for (B, C, H, W) images. Shapes and types are compared on the way."""
    values = {network.get_input(0).name: images}
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        inputs = [values[layer.get_input(i).name] for i in range(layer.num_inputs)]
        output = layer.get_output(0)
        value = _compute(trt, layer, inputs)
        expected = tuple(len(images) if side == -1 else side for side in output.shape)
        # a batch that is regrouped is unknown to TensorRT, as the true one is
        assert tuple(value.shape)[1:] == expected[1:], (layer.name, value.shape, expected)
        assert {"FLOAT": torch.float32, "HALF": torch.float16, "INT32": torch.int32}[output.dtype.name] == value.dtype
        values[output.name] = value
    return values[network.get_output(0).name]


def _compute(trt: ModuleType, layer: Any, inputs: list[Tensor]) -> Tensor:
    name, compute = KINDS[layer.type.name]
    layer.__class__ = getattr(trt, name)  # how TensorRT's Python module gives access to a layer's own attributes
    return compute(trt, layer, *inputs)


def _convolution(trt: ModuleType, layer: Any, x: Tensor) -> Tensor:
    kernel = np.array(layer.kernel).reshape(layer.num_output_maps, -1, *layer.kernel_size_nd)
    assert kernel.dtype == x.numpy().dtype
    bias = np.array(layer.bias)
    steps = {"stride": layer.stride_nd, "padding": layer.padding_nd, "dilation": layer.dilation_nd}
    steps = {name: tuple(value) for name, value in steps.items()}
    weights = torch.from_numpy(kernel).float(), torch.from_numpy(bias).float() if bias.size else None
    return F.conv2d(x.float(), *weights, **steps, groups=layer.num_groups).to(x.dtype)


def _activation(trt: ModuleType, layer: Any, x: Tensor) -> Tensor:
    assert layer.type == trt.ActivationType.SIGMOID
    return x.sigmoid()


def _elementwise(trt: ModuleType, layer: Any, x: Tensor, y: Tensor) -> Tensor:
    operation = {trt.ElementWiseOperation.SUM: torch.add, trt.ElementWiseOperation.PROD: torch.mul}[layer.op]
    assert x.dtype == y.dtype
    return operation(x, y)


def _pooling(trt: ModuleType, layer: Any, x: Tensor) -> Tensor:
    assert layer.type == trt.PoolingType.MAX
    window = tuple(layer.window_size_nd), tuple(layer.stride_nd), tuple(layer.padding_nd)
    return F.max_pool2d(x, *window)


def _resize(trt: ModuleType, layer: Any, x: Tensor) -> Tensor:
    assert layer.resize_mode == trt.InterpolationMode.NEAREST
    assert layer.nearest_rounding == trt.ResizeRoundMode.FLOOR
    assert layer.coordinate_transformation == trt.ResizeCoordinateTransformation.ASYMMETRIC
    return F.interpolate(x, scale_factor=tuple(layer.scales)[2:], mode="nearest")


def _concatenation(trt: ModuleType, layer: Any, *maps: Tensor) -> Tensor:
    assert len({x.dtype for x in maps}) == 1
    return torch.cat(maps, layer.axis)


def _shuffle(trt: ModuleType, layer: Any, x: Tensor) -> Tensor:
    x = x.permute(tuple(layer.first_transpose)[: x.dim()])  # always of eight axes there
    return x if layer.reshape_dims is None else x.reshape(tuple(layer.reshape_dims))


def _gather(trt: ModuleType, layer: Any, x: Tensor, channels: Tensor) -> Tensor:
    return x.index_select(layer.axis, channels.long())


def _cast(trt: ModuleType, layer: Any, x: Tensor) -> Tensor:
    return x.to({trt.float32: torch.float32, trt.float16: torch.float16}[layer.to_type])


def _grid_sample(trt: ModuleType, layer: Any, x: Tensor, grid: Tensor) -> Tensor:
    assert layer.interpolation_mode == trt.InterpolationMode.LINEAR and layer.sample_mode == trt.SampleMode.FILL
    assert x.dtype == grid.dtype == torch.float32
    return F.grid_sample(x, grid, "bilinear", "zeros", align_corners=layer.align_corners)


def _constant(trt: ModuleType, layer: Any) -> Tensor:
    return torch.from_numpy(np.array(layer.weights).reshape(tuple(layer.shape)))


KINDS = {
    "CONVOLUTION": ("IConvolutionLayer", _convolution),
    "ACTIVATION": ("IActivationLayer", _activation),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "POOLING": ("IPoolingLayer", _pooling),
    "RESIZE": ("IResizeLayer", _resize),
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "GATHER": ("IGatherLayer", _gather),
    "CAST": ("ICastLayer", _cast),
    "GRID_SAMPLE": ("IGridSampleLayer", _grid_sample),
    "CONSTANT": ("IConstantLayer", _constant),
}
