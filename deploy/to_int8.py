"""An ONNX graph in eight bits: ONNX Runtime's quantisation after training, with ranges seen on pictures.

Weights (by channel) and what flows between layers are held as eight-bit whole numbers, with QuantizeLinear and
DequantizeLinear around each operator; a runtime multiplies them as they are. Left in float32 is where it would cost
boxes: the head from its last convolutions on, and all of a DCN layer, whose coordinates are too fine for 256 steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUANTISED = ("Conv", "Sigmoid", "Mul", "Add", "MaxPool", "Resize", "Relu", "LeakyRelu", "Clip")
"""Operators of the backbone and neck, but Concat, which would take one range for all of its inputs: yolov5n-dcn lost
four points of mAP50 by it, and no time."""


def quantise(proto: Any, folder: Path, batches: Iterable[np.ndarray], floating: Iterable[str]) -> Any:
    """The onnx.ModelProto ``proto`` in eight bits.

    ``batches``: float32 (B, 3, H, W) inputs, whose ranges count; ``floating``: names of nodes that stay as they are,
    beside the head; ``folder`` for the file in between.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    made = folder / "int8.onnx"
    quantize_static(
        copy.deepcopy(proto),  # which it changes
        made,
        _reader(proto.graph.input[0].name, batches),
        op_types_to_quantize=list(QUANTISED),
        nodes_to_exclude=sorted(head_nodes(proto.graph) | set(floating)),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    result = onnx.load(made)
    made.unlink()
    return result


def _reader(name: str, batches: Iterable[np.ndarray]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    return Reader()


def head_nodes(graph: Any) -> set[str]:
    """Names of the convolutions that no other one follows, and of all that follows them."""
    followed = _followers(graph)
    convolutions = {node.name for node in graph.node if node.op_type == "Conv"}
    last = {name for name in convolutions if not followed[name] & convolutions}
    return last.union(*(followed[name] for name in last))


def nodes_within(graph: Any, scopes: Sequence[str]) -> set[str]:
    """Names of the nodes that torch's exporter made of these modules (dotted names) or of what is in them."""
    found = set()
    for node in graph.node:
        noted = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        if any(f"'{scope}'" in noted for scope in scopes):
            found.add(node.name)
    return found


def _followers(graph: Any) -> dict[str, set[str]]:
    """Of each node the names of all nodes that come after it. ``graph.node`` is in the order of computation."""
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node.name)
    after: dict[str, set[str]] = {}
    for node in reversed(graph.node):
        direct = {name for value in node.output for name in readers.get(value, ())}
        after[node.name] = direct.union(*(after[name] for name in direct))
    return after
