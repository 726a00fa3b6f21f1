"""A model as one ONNX file, with optional suppression inside."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploy.dcn_forms import ExportDCN
from deploy.metadata import Metadata
from deploy.to_int8 import nodes_within, quantise
from deploy.wrap import ExportModel, dynamic_axes, quiet
from utils.errors import ConfigError

OPSETS = {"deformconv": 19, "gridsample": 18, "": 18}
"""By form of the DCN layers: DeformConv exists from 19 on; TensorRT 10.1 misreads GridSample from 20 on."""
INPUT, OUTPUT = "images", "output0"


def check_opset(opset: int | None, form: str) -> int:
    """The opset to write. Raises ConfigError for one in which the form does not exist."""
    least = OPSETS[form]
    if opset is None:
        return least
    if not least <= opset <= 23:
        what = f"--dcn {form} needs" if form else "expected"
        raise ConfigError(f"--opset {opset}: {what} {least} to 23; leave it out for {least}")
    return opset


def export_onnx(
    model: ExportModel,
    example: Tensor,
    path: Path,
    meta: Metadata,
    opset: int,
    suppress: dict[str, Any] | None,
    calibration: Iterable[np.ndarray] | None = None,
) -> None:
    """Write ``path``. ``example`` (B, 3, H, W) has the size, and unless ``meta.dynamic`` the only size, of the input.

    ``suppress``: conf, iou and max_det of suppression inside the file (--nms), None without it. ``calibration``:
    inputs as ``example``, whose ranges are those of a file in eight bits; None for one in floats.
    """
    import onnx

    shapes = {"images": dynamic_axes(meta.stride)} if meta.dynamic else None
    with quiet("torch.onnx"):
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    proto = program.model_proto
    if calibration is not None:  # while the nodes say what they were made of
        deformable = [name for name, module in model.named_modules() if isinstance(module, ExportDCN)]
        floating = nodes_within(proto.graph, deformable)
    _strip(proto.graph)
    if meta.dynamic:
        _name_axes(proto.graph)
    if calibration is not None:
        with quiet(""):  # the root logger
            proto = quantise(proto, path.parent, calibration, floating)
    if suppress is not None:
        proto = _with_suppression(proto, len(meta.names), **suppress)
    onnx.helper.set_model_props(proto, meta.entries())
    proto.producer_name, proto.producer_version = "export.py", meta.version
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def _strip(graph: Any) -> None:
    """Drop what the exporter notes about each node: a third of a small file, with paths of this machine."""
    for part in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for each in part:
            del each.metadata_props[:]
            each.doc_string = ""
    del graph.metadata_props[:]


def _name_axes(graph: Any) -> None:
    """Words in place of the exporter's arithmetic (32*s18), for whoever looks at the input and the output."""
    for value, axes in ((graph.input[0], {2: "height", 3: "width"}), (graph.output[0], {1: "boxes"})):
        for axis, word in axes.items():
            value.type.tensor_type.shape.dim[axis].dim_param = word


SUPPRESSION = """
suppression (float[batch, rows, columns] predictions) => (float[found, 7] detections)
<int64[3] parts = {{4, 1, {nc}}}, int64[1] last = {{2}}, int64[1] one = {{1}}, float zero = {{0}}, float half = {{0.5}},
 int64[1] most = {{{max_det}}}, float[1] overlap = {{{iou:.8f}}}, float[1] least = {{{conf:.8f}}}>
{{
    boxes, objectness, classes = Split <axis = 2> (predictions, parts)
    scores = Mul (objectness, classes)
    best = ReduceMax (scores, last)
    lower = Less (scores, best)
    of_best = Where (lower, zero, scores)
    by_class = Transpose <perm = [0, 2, 1]> (of_best)
    kept = NonMaxSuppression <center_point_box = 1> (boxes, by_class, most, overlap, least)
    image, class, row = Split <axis = 1, num_outputs = 3> (kept)
    place = Concat <axis = 1> (image, row)
    box = GatherND (boxes, place)
    score_place = Concat <axis = 1> (image, row, class)
    score_row = GatherND (scores, score_place)
    score = Unsqueeze (score_row, one)
    centre, size = Split <axis = 1, num_outputs = 2> (box)
    reach = Mul (size, half)
    first = Sub (centre, reach)
    second = Add (centre, reach)
    image_number = Cast <to = 1> (image)
    class_number = Cast <to = 1> (class)
    detections = Concat <axis = 1> (image_number, first, second, score, class_number)
}}
"""
"""In ONNX's own text form. Rows (n, 7) float32: image, x1, y1, x2, y2 in network pixels, confidence, class. As
detect.py without --agnostic-nms: the best class of a box counts, classes do not suppress each other; but ``max_det`` is
the limit for each class of an image, and rows are in the order of image and class."""


def _with_suppression(proto: Any, nc: int, conf: float, iou: float, max_det: int) -> Any:
    """The model followed by SUPPRESSION."""
    import onnx

    text = SUPPRESSION.format(nc=nc, conf=conf, iou=iou, max_det=max_det)
    tail = onnx.helper.make_model(
        onnx.parser.parse_graph(text), ir_version=proto.ir_version, opset_imports=proto.opset_import
    )
    tail.graph.CopyFrom(onnx.compose.add_prefix(tail, "nms_", rename_outputs=False).graph)
    return onnx.compose.merge_models(proto, tail, io_map=[(OUTPUT, "nms_predictions")])
