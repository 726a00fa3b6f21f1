"""A model as OpenVINO's IR: a folder with one .xml and one .bin."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deploy.metadata import Metadata
from deploy.wrap import ExportModel, quiet

SECTION = "model_info"
"""Of the .xml's rt_info, where the metadata is."""


def export_openvino(model: ExportModel, example: Tensor, folder: Path, meta: Metadata) -> None:
    """Convert the torch module itself (OpenVINO cannot read DeformConv from ONNX) and write ``folder``, named after the
    .xml in it. With ``meta.half`` weights are stored in float16; input and output stay float32."""
    import openvino

    size = [-1, 3, -1, -1] if meta.dynamic else list(example.shape)
    with quiet(), torch.no_grad():
        converted = openvino.convert_model(model, example_input=example, input=[size])
    for name, text in meta.entries().items():
        converted.set_rt_info(text, [SECTION, name])
    folder.mkdir()
    openvino.save_model(converted, folder / f"{folder.name.split('_openvino')[0]}.xml", compress_to_fp16=meta.half)
