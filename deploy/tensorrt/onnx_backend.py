"""Back end that writes ONNX nodes: the proof, in ONNX Runtime, of what TensorRT is told."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploy.tensorrt.backend import Backend, Map, Steps
from utils.errors import MissingPackage, is_installed

OPSETS = {"deformconv": 19, "gridsample": 18, "plugin": 18}
PLUGIN, DOMAIN = "DCNv2", "dcn"
"""Name of our TensorRT plugin (plugin/), and the domain of its nodes."""


class OnnxNetwork(Backend):
    """Handles are names. ``form`` of DCN layers: the operator DeformConv, GridSample as in TensorRtNetwork, or the
    node ``plugin``, which only TensorRT with our plugin can run."""

    def __init__(self, form: str) -> None:
        if not is_installed("onnx"):
            raise MissingPackage("a network as ONNX", "onnx")
        self.form, self.has_deform_conv, self.opset = form, form != "gridsample", OPSETS[form]
        self.nodes: list[Any] = []
        self.arrays: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def input(self, name: str, shape: tuple[int, ...]) -> Map:
        self.inputs.append(_port(name, shape))
        return Map(name, shape, np.dtype(np.float32))

    def output(self, x: Map, name: str) -> None:
        self._node("Identity", [x.handle], output=name)
        self.outputs.append(_port(name, x.shape))

    def finish(self, entries: dict[str, str]) -> bytes:
        from onnx import checker, helper

        graph = helper.make_graph(self.nodes, "detector", self.inputs, self.outputs, self.arrays)
        domains = [helper.make_opsetid("", self.opset)]
        domains += [helper.make_opsetid(DOMAIN, 1)] if self.form == "plugin" else []
        model = helper.make_model(graph, opset_imports=domains, ir_version=9)
        model.producer_name = "deploy.tensorrt"
        helper.set_model_props(model, entries)
        checker.check_model(model, full_check=True)
        return model.SerializeToString()

    def deform_conv(
        self, x: Map, offset: Map, mask: Map, weight: np.ndarray, bias: np.ndarray | None, steps: Steps
    ) -> Map:
        if self.form == "plugin":
            return self._plugin(x, offset, mask, weight, bias, steps)
        wide = [self.cast(each, np.float32).handle for each in (x, offset, mask)]
        taps = weight.shape[2] * weight.shape[3]
        handle = self._node(
            "DeformConv",
            [wide[0], self._array(weight), wide[1], "" if bias is None else self._array(bias), wide[2]],
            offset_group=offset.shape[0] // (2 * taps),
            **_attributes(weight, steps),
        )
        return self.cast(Map(handle, (weight.shape[0], *offset.shape[1:]), np.dtype(np.float32)), x.dtype)

    def _plugin(self, x: Map, offset: Map, mask: Map, weight: np.ndarray, bias: np.ndarray | None, steps: Steps) -> Map:
        """All inputs of x's type: the kernel adds offsets to coordinates in float32."""
        maps = [each.handle for each in (x, self.cast(offset, x.dtype), self.cast(mask, x.dtype))]
        arrays = [self._array(each.astype(x.dtype)) for each in (weight, bias) if each is not None]
        attributes = {
            "stride": list(steps.stride), "padding": list(steps.padding), "dilation": list(steps.dilation),
            "groups": [steps.groups], "offset_groups": [offset.shape[0] // (2 * weight.shape[2] * weight.shape[3])],
        }  # fmt: skip
        handle = self._node(PLUGIN, [*maps, *arrays], domain=DOMAIN, **attributes)
        return Map(handle, (weight.shape[0], *offset.shape[1:]), x.dtype)

    def _conv(self, x: str, weight: np.ndarray, bias: np.ndarray | None, steps: Steps) -> str:
        more = [] if bias is None else [self._array(bias)]
        return self._node("Conv", [x, self._array(weight), *more], **_attributes(weight, steps))

    def _constant(self, array: np.ndarray) -> str:
        return self._array(array)

    def _grid_sample(self, x: str, grid: str) -> str:
        return self._node("GridSample", [x, grid], mode="bilinear", padding_mode="zeros", align_corners=0)

    def _sigmoid(self, x: str) -> str:
        return self._node("Sigmoid", [x])

    def _add(self, x: str, y: str) -> str:
        return self._node("Add", [x, y])

    def _mul(self, x: str, y: str) -> str:
        return self._node("Mul", [x, y])

    def _max_pool(self, x: str, kernel: int) -> str:
        return self._node("MaxPool", [x], kernel_shape=[kernel] * 2, strides=[1, 1], pads=[kernel // 2] * 4)

    def _upsample(self, x: str, factor: int) -> str:
        scales = self._array(np.array([1, 1, factor, factor], np.float32))
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self._node("Resize", [x, "", scales], **how)

    def _concat(self, maps: list, axis: int) -> str:
        return self._node("Concat", maps, axis=axis)

    def _reshape(self, x: str, shape: tuple[int, ...]) -> str:
        return self._node("Reshape", [x, self._array(np.array(shape, np.int64))])

    def _permute(self, x: str, order: tuple[int, ...]) -> str:
        return self._node("Transpose", [x], perm=list(order))

    def _take(self, x: str, channels: np.ndarray) -> str:
        return self._node("Gather", [x, self._array(channels)], axis=1)

    def _cast(self, x: str, dtype: np.dtype) -> str:
        from onnx import helper

        return self._node("Cast", [x], to=helper.np_dtype_to_tensor_dtype(dtype))

    def _node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{len(self.nodes)}", **attributes))
        return output

    def _array(self, array: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"array_{len(self.arrays)}"
        self.arrays.append(numpy_helper.from_array(array, name))
        return name


def _attributes(weight: np.ndarray, steps: Steps) -> dict[str, Any]:
    return {
        "kernel_shape": list(weight.shape[2:]),
        "strides": list(steps.stride),
        "pads": [*steps.padding, *steps.padding],
        "dilations": list(steps.dilation),
        "group": steps.groups,
    }


def _port(name: str, shape: tuple[int, ...]) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
